"""A transfer bundle: a folder with all that is kept of a language adapter for a later transfer.

    adapter/         the source adapter, an ordinary PEFT directory without its recipe
    discriminator/   the filter, a LoRA of the same base (absent without one)
    seeds.jsonl      the inputs that are kept, one {"input": ...} per line
    template.json    what inputs and answers look like, and how they are asked
    manifest.json    the base, hashes of it, its tokenizer and these files, number of rows, measures of the filter

Nothing else of the training data is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from adapters import files
from adapters.errors import FamilyError, InputError
from adapters.generation.trans_lora import TaskTemplate

VERSION = 1
ADAPTER, DISCRIMINATOR, SEEDS = "adapter", "discriminator", "seeds.jsonl"
TEMPLATE, MANIFEST = "template.json", "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        base, base_sha256: the source base's name, and the hash of its files (empty for a hub id).
        tokenizer_sha256: :func:`spelling` of its tokenizer.
        rows: |D|.
        seeds: inputs of the task.
        judged: measures of the discriminator on held-out inputs; empty if there is none.
    """

    folder: Path
    base: str
    base_sha256: str
    tokenizer_sha256: str
    rows: int
    seeds: tuple[str, ...]
    template: TaskTemplate
    judged: Mapping[str, float]

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    @property
    def discriminator(self) -> Path | None:
        """The filter's folder, or None."""
        place = self.folder / DISCRIMINATOR
        return place if place.is_dir() else None


def identity(source: str) -> str:
    """SHA-256 of a base's files (weights, configuration and tokenizer); empty for a hub id."""
    from studio import library

    place = Path(source)
    return library.sha256(place, "base") if place.exists() else ""


def spelling(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and chat template."""
    told = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template or ""]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def write(
    folder: Path, base: str, base_sha256: str, tokenizer_sha256: str, rows: int, seeds: Sequence[str],
    template: TaskTemplate, judged: Mapping[str, float],
) -> Path:  # fmt: skip
    """Complete ``folder``, in which the adapters lie already, with the other files; returns it."""
    files.write_text(folder / SEEDS, "".join(json.dumps({"input": one}, ensure_ascii=False) + "\n" for one in seeds))
    files.write_text(folder / TEMPLATE, json.dumps(asdict(template), indent=1, ensure_ascii=False) + "\n")
    head = {"version": VERSION, "base": base, "base_sha256": base_sha256, "tokenizer_sha256": tokenizer_sha256,
            "rows": rows, "discriminator": dict(judged), "files": _hashes(folder)}  # fmt: skip
    files.write_text(folder / MANIFEST, json.dumps(head, indent=1, ensure_ascii=False) + "\n")
    return folder


def read(place: str | Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        InputError: there is none, a file is missing, changed or damaged, or it is of another version.
    """
    folder = Path(place).expanduser()
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"'{place}' is no transfer bundle (it has no {MANIFEST}): make one with  studio transfer prepare."
        )
    try:
        head = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if head["version"] != VERSION:
            raise InputError(f"The bundle '{place}' is of version {head['version']}, this program reads {VERSION}.")
        kept, found = dict(head["files"]), _hashes(folder)
        if changed := sorted({name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name)}):
            raise InputError(
                f"The bundle '{place}' is not as it was made: '{changed[0]}' is missing, new or changed. Use an "
                "unchanged copy, or prepare it again."
            )
        lines = (folder / SEEDS).read_text(encoding="utf-8").splitlines()
        seeds = tuple(str(json.loads(line)["input"]) for line in lines if line.strip())
        if not seeds:
            raise InputError(f"The bundle '{place}' has no seeds, so nothing shows what inputs look like.")
        values = json.loads((folder / TEMPLATE).read_text(encoding="utf-8"))
        template = TaskTemplate(
            **{one.name: values[one.name] for one in fields(TaskTemplate)} | {"labels": tuple(values["labels"])}
        )
        return Bundle(
            folder, str(head["base"]), str(head["base_sha256"]), str(head["tokenizer_sha256"]), int(head["rows"]),
            seeds, template,
            {name: float(value) for name, value in head["discriminator"].items()},
        )  # fmt: skip
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The bundle '{place}' is damaged ({type(error).__name__}: {error}).") from None


def check_discriminator(bundle: Bundle) -> None:
    """Raises :class:`InputError` if there is none to filter with."""
    if bundle.discriminator is None:
        raise InputError(
            f"The bundle '{bundle.folder}' has no discriminator: transfer without the filter (--no-filter), or "
            "prepare it again with one."
        )


def check_base(bundle: Bundle, source: str, given: str) -> None:
    """Refuse another base than the adapter's.

    Args:
        source: what will be loaded; ``given``: what the user calls it.

    Raises:
        FamilyError: its files, with the tokenizer's, have another hash, or it is another hub id.
    """
    found = identity(source)
    if found != bundle.base_sha256 or (not found and source != bundle.base):
        raise FamilyError(
            f"'{given}' is not the base of this bundle's adapter ('{bundle.base}'), or its weights or tokenizer "
            "differ: say where that one is now with --base."
        )


def check_tokenizer(bundle: Bundle, tokenizer: Any, given: str) -> None:
    """Refuse another tokenizer than the adapter's; ``given`` is what the user calls its base.

    Raises:
        FamilyError: its vocabulary or chat template is another one.
    """
    if spelling(tokenizer) != bundle.tokenizer_sha256:
        raise FamilyError(
            f"The tokenizer of '{given}' has another vocabulary or chat template than the one the bundle was made "
            "with: use that version of the base."
        )


def _hashes(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file but the manifest."""
    return {
        file.relative_to(folder).as_posix(): files.sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
