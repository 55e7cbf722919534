"""``studio data``: look at a folder of training pictures, and edit its captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio.cli.output import Json, Output, Quiet, facts

Folder = Annotated[Path, typer.Argument(help="Folder of pictures.")]

group = typer.Typer(help="Training pictures: check a folder, edit captions and tags.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="data")


@group.command()
def show(
    folder: Folder,
    tags: Annotated[int, typer.Option("--tags", min=0, help="How many of the most frequent tags to show.")] = 20,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what training would find: pictures, captions, tags, and what cannot be read.

    Example:  studio data show photos
    """
    from studio.datasets import caption_edits
    from studio.datasets.pictures import scan

    report = scan(folder.expanduser())
    captions = {str(picture.path): picture.caption or "" for picture in report.pictures}
    counts = caption_edits.tag_counts(captions)
    found = {
        "pictures": len(report.pictures), "without caption": len(report.uncaptioned), "cannot be read": report.broken,
        "different tags": len(counts), "tags": counts[:tags], "remarks": report.remarks,
    }  # fmt: skip
    shown = {
        **found,
        "cannot be read": [f"{name} ({reason})" for name, reason in report.broken.items()],
        "tags": [f"{tag} ({count})" for tag, count in counts[:tags]],
    }
    Output(json, quiet).result(found, lambda: facts(shown.items()))


@group.command()
def caption(
    folder: Folder,
    same: Annotated[str, typer.Option("--all", help="This caption for every picture.")] = "",
    only_missing: Annotated[
        bool, typer.Option("--only-missing", help="With --all or --model: keep existing captions.")
    ] = False,
    find: Annotated[str, typer.Option("--find", help="Words to replace.")] = "",
    put: Annotated[str, typer.Option("--replace", help="Replacement for --find; empty removes it.")] = "",
    whole_words: Annotated[bool, typer.Option("--whole-words", help="--find never matches inside a word.")] = False,
    add: Annotated[str, typer.Option("--add", help="Tags to append to every caption, separated by commas.")] = "",
    remove: Annotated[str, typer.Option("--remove", help="Tags to remove, separated by commas.")] = "",
    model: Annotated[
        str, typer.Option("--model", help="Folder of a Transformers image-to-text model that writes captions.")
    ] = "",
    prompt: Annotated[
        str, typer.Option("--prompt", help="What --model is asked, or what its captions begin with.")
    ] = "",
    device: Annotated[str, typer.Option("--device", help="Where --model runs: auto, cpu, cuda, mps.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes, write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Change the captions of a folder's pictures; several changes are made in the order of the options.

    Example:  studio data caption photos --find dog --replace zxq --whole-words
    """
    from studio.datasets import caption_edits as edits

    output = Output(json, quiet)
    if not any((same, find, add, remove, model)):
        raise InputError("There is nothing to change: give --all, --find, --add, --remove or --model.")
    if same and model:
        raise InputError("--all and --model both write every caption: give one of them.")
    place = folder.expanduser()
    before = edits.read_folder(place)
    after = edits.same_for_all(before, same, only_missing) if same else dict(before)
    if model:
        after |= _written(place, before, only_missing, {"folder": model, "prompt": prompt, "device": device}, output)
    if find:
        after = edits.replaced(after, find, put, whole_words)
    if add:
        after = edits.with_tags(after, edits.tags_of(add))
    if remove:
        after = edits.without_tags(after, edits.tags_of(remove))
    changed = {name: text for name, text in after.items() if text != before[name]}
    if not dry_run:
        edits.write_folder(place, changed)
    count = f"{len(changed)} of {len(before)} captions {'would be' if dry_run else 'are'} changed."
    output.result({"changed": changed, "written": not dry_run},
                  "\n".join([*(f"{name}: {text}" for name, text in changed.items()), count]))  # fmt: skip


def _written(
    place: Path, before: dict[str, str], only_missing: bool, model: dict[str, Any], output: Output
) -> dict[str, str]:
    """Captions from the model for the pictures that need one."""
    from studio import silence
    from studio.cli.terminal import Terminal
    from studio.datasets.captioner import Captioner

    silence.library_warnings()
    names = [name for name, text in before.items() if not (only_missing and text)]
    captioner = Captioner(**model)
    with Terminal(output.quiet) as terminal:
        return dict(zip(names, captioner.captions([place / name for name in names], terminal), strict=True))
