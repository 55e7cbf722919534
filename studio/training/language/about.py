"""The language tasks: each declares ``LANGUAGE = About(...)`` in its module of :mod:`studio.training.tasks`.

It is read from the source text, so that the schema, the command and the page know the tasks without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from adapters import discovery


@dataclass(frozen=True)
class About:
    """A language task.

    Attributes:
        name: its name in the configuration.
        summary: what is learnt, in a few words.
        entry: ``"module:class"`` of its :class:`~studio.training.tasks.language.LanguageTask`.
        rows: ``"module:function"`` that reads the rows of a configuration without importing torch.
    """

    name: str
    summary: str
    entry: str
    rows: str = "studio.training.language.rows:texts"


@cache
def known() -> dict[str, About]:
    """The language tasks by name."""
    files = discovery.sources("studio.training.tasks")
    found = [about for file in files for about in discovery.declarations(file, {"About": About}, "LANGUAGE")]
    return {about.name: about for about in found}
