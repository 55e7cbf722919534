"""The chat template an adapter was trained with, in which it answers best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.datasets.encoding import CHATML


@dataclass(frozen=True)
class Spoken:
    """How the conversations of a training were written.

    Attributes:
        template: Jinja text; empty = none was used; None = unknown.
        begin, end: tokens at the beginning and end of texts; empty = unknown.
        missing: the template's file, if it cannot be found.
    """

    template: str | None = None
    begin: str = ""
    end: str = ""
    missing: str = ""


def spoken(path: Path, recipe: dict[str, Any] | None) -> Spoken:
    """How the adapter at ``path`` was trained: from its recipe, else the template saved beside it (as TRL does)."""
    recipe = recipe or {}
    data, config = (part if isinstance(part := recipe.get(name), dict) else {} for name in ("data", "config"))
    noted = data.get("chat")
    if isinstance(noted, dict) and isinstance(noted.get("template"), str):
        return Spoken(noted["template"], str(noted.get("begin") or ""), str(noted.get("end") or ""))
    if named := str(config.get("chat_template") or ""):  # recipes before the text itself was kept
        if named == "chatml":
            return Spoken(CHATML)
        text = _text(Path(named).expanduser())
        return Spoken(text, missing="" if text is not None else named)
    return Spoken(_text(path / "chat_template.jinja"))


def differs(name: str, learnt: Spoken, tokenizer: Any, base: str) -> list[str]:
    """Remarks on how the adapter's training differs from the base's own template and tokens."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    found = []
    if learnt.missing:
        found.append(f"'{name}' was trained with the chat template '{learnt.missing}', which is missing: the base's is "
                     "used, and the answers may be worse.")  # fmt: skip
    elif learnt.template is not None and learnt.template != own:
        found.append(f"'{name}' was trained with another chat template than {base}'s: that of the training is used.")
    for what, wanted, has in (
        ("begin", learnt.begin, tokenizer.bos_token), ("end", learnt.end, tokenizer.eos_token)
    ):  # fmt: skip
        if wanted and wanted != (has or ""):
            found.append(f"'{name}' learnt texts that {what} with '{wanted}'; with {base} they {what} with '{has}'.")
    return found


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None
