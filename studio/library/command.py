"""``studio library``: adapters and base models."""

from __future__ import annotations

import json as codec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from studio.cli.output import Json, Output, Quiet, facts, lines, moment, size, table
from studio.library import base_families

if TYPE_CHECKING:
    from studio.library import Record

Bases = Annotated[bool, typer.Option("--base", "-b", help="A base model instead of an adapter.")]
Name = Annotated[str, typer.Argument(help="Name in the library.")]

group = typer.Typer(help="Adapters and base models: list, show, import, rename, delete.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="library")


@group.command("list")
def list_(
    bases: Annotated[bool, typer.Option("--bases", "-b", help="Base models instead of adapters.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List adapters, or base models.

    Example:  studio library list --bases
    """
    from studio import library

    found = library.bases() if bases else library.adapters()
    output = Output(json, quiet)
    if not found:
        output.note("Nothing here yet: studio library import PATH-OR-HUB-ID, or add a folder in studio settings.")
    output.result(
        [record.as_json() for record in found], lambda: found and (_bases(found) if bases else _adapters(found))
    )


@group.command()
def show(name: Name, base: Bases = False, json: Json = False, quiet: Quiet = False) -> None:
    """Show everything about one adapter or base model, with its sha256.

    Example:  studio library show fox
    """
    from studio import library

    record = library.show(name, _kind(base))
    Output(json, quiet).result(record.as_json(), lambda: _facts(record))


@group.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="File, folder, or hub id (owner/repo, owner/repo/file.safetensors).")],
    name: Annotated[str | None, typer.Option("--name", help="Name in the library; default: the source's own.")] = None,
    base: Bases = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy an adapter or base model into the library.

    Example:  studio library import fox.safetensors --name my-fox
    """
    from studio import library

    record = library.import_base(source, name) if base else library.import_adapter(source, name)
    Output(json, quiet).result(record.as_json(), f"Imported '{record.name}' ({record.family}) to {record.path}.")


@group.command()
def rename(
    name: Name,
    new_name: Annotated[str, typer.Argument(help="Its new name.")],
    base: Bases = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rename an adapter or base model."""
    from studio import library

    record = library.rename(name, new_name, _kind(base))
    Output(json, quiet).result(record.as_json(), f"'{name}' is now '{record.name}'.")


@group.command()
def delete(name: Name, base: Bases = False, json: Json = False, quiet: Quiet = False) -> None:
    """Move an adapter or base model to the trash."""
    from studio import library

    item = library.trash(name, _kind(base))
    Output(json, quiet).result(
        {"id": item.id, "name": item.name, "original": str(item.original)},
        f"'{item.name}' is in the trash: studio library restore {item.id} brings it back.",
    )


@group.command()
def restore(
    name: Annotated[str, typer.Argument(help="Name, or id in the trash.")], json: Json = False, quiet: Quiet = False
) -> None:
    """Bring an adapter or base model back from the trash."""
    from studio import library

    record = library.restore(name)
    Output(json, quiet).result(record.as_json(), f"'{record.name}' is back at {record.path}.")


@group.command()
def trash(
    empty: Annotated[bool, typer.Option("--empty", help="Delete its contents permanently.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show or empty the trash."""
    from studio import library

    output = Output(json, quiet)
    if empty:
        number = library.empty_trash()
        output.result({"deleted": number}, f"Deleted {number} item(s) permanently.")
        return
    found = library.trashed()
    output.result(
        [{"id": i.id, "name": i.name, "kind": i.kind, "original": str(i.original), "deleted": i.deleted}
         for i in found],
        lambda: table(["id", "name", "kind", "deleted"], [(i.id, i.name, i.kind, moment(i.deleted)) for i in found]),
    )  # fmt: skip


@group.command()
def scan(json: Json = False, quiet: Quiet = False) -> None:
    """Read and hash every adapter and base model, and list what cannot be used."""
    from studio import library

    report: dict[str, Any] = {"adapters": 0, "bases": 0, "unreadable": []}
    found: list[tuple[Literal["adapter", "base"], list[Record]]] = [
        ("adapter", library.adapters()), ("base", library.bases())
    ]  # fmt: skip
    for kind, records in found:
        for record in records:
            if record.problem:
                report["unreadable"].append({"path": str(record.path), "reason": record.problem})
            else:
                library.sha256(record.path, kind)
                report["adapters" if kind == "adapter" else "bases"] += 1
    lines = [f"{report['adapters']} adapter(s), {report['bases']} base model(s)"]
    lines += [f"unreadable: {entry['path']}: {entry['reason']}" for entry in report["unreadable"]]
    Output(json, quiet).result(report, "\n".join(lines))


def _kind(base: bool) -> Literal["adapter", "base"]:
    return "base" if base else "adapter"


def _adapters(found: list[Record]) -> Any:
    return table(
        ["name", "family", "rank", "size", "triggers", "from", ""],
        [(r.name, r.family, r.rank, size(r.size), r.triggers, r.source, r.problem and f"unreadable: {r.problem}")
         for r in found],
    )  # fmt: skip


def _bases(found: list[Record]) -> Any:
    return table(
        ["name", "family", "format", "size", "licence", "works with", "from", ""],
        [(r.name, r.family, r.format, size(r.size), _licence(r), base_families.works_with(r.family), r.source,
          r.problem and f"unreadable: {r.problem}")
         for r in found],
    )  # fmt: skip


def _licence(record: Record) -> str:
    """What the base itself says, else that of its family's public checkpoints."""
    return str(record.notes.get("license") or base_families.licence(record.family))


def _facts(record: Record) -> Any:
    recipe = lines(codec.dumps(record.recipe, indent=1, ensure_ascii=False)) if record.recipe else ""
    return facts(
        [
            ("name", record.name), ("problem", record.problem), ("family", record.family), ("format", record.format),
            ("rank", record.rank), ("targets", record.targets), ("size", size(record.size)),
            ("triggers", record.triggers), ("sha256", record.sha256), ("path", record.path),
            ("preview", record.preview), ("from", record.source), *_use(record), *record.notes.items(),
            ("recipe", recipe),
        ]
    )  # fmt: skip


def _use(record: Record) -> list[tuple[str, Any]]:
    """What a base is for; nothing for adapters."""
    if record.kind != "base":
        return []
    own = record.notes.get("license")
    return [
        ("works with", base_families.works_with(record.family)),
        *([] if own else [("licence of the family", base_families.licence(record.family))]),
    ]
