"""Conversations with pictures, in the form that transformers' processors take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapters.errors import InputError

PLACE = "\ufffc"
"""Stands in a text where a picture belongs (U+FFFC, the object replacement character)."""


def with_pictures(messages: Sequence[Mapping[str, Any]], pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts.

    Args:
        messages: ``role`` and ``content`` each (other keys are kept), every :data:`PLACE` in a content stands for a
            picture.
        pictures: PIL images in the order of their places.

    Raises:
        InputError: there are more or fewer pictures than places.
    """
    rest = iter(pictures)
    made = [{**message, "content": list(_parts(str(message["content"]), rest))} for message in messages]
    if (left := len(list(rest))) > 0:
        raise InputError(f"{left} pictures have no place in the conversation: put one into a message for each.")
    return made


def _parts(text: str, pictures: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(text.split(PLACE)):
        if number:
            picture = next(pictures, None)
            if picture is None:
                raise InputError("The conversation has more places for pictures than pictures.")
            yield {"type": "image", "image": picture}
        if words := piece.strip("\n"):  # templates put line breaks around pictures themselves
            yield {"type": "text", "text": words}
