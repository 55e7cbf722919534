"""``studio compose``: pictures from a prompt, a file, or another picture's recipe."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio import silence
from studio.cli.output import Json, Output, Quiet, duration
from studio.cli.schema_options import pair, with_options
from studio.composition import lora_option, region_option
from studio.composition.distilled_adapters import sampler
from studio.composition.picture_schema import PICTURES
from studio.composition.region_schema import DEFAULT_METHOD, REGIONAL_METHODS
from studio.composition.schema import ComposeConfig
from studio.composition.sweep_schema import SweepConfig, parse_axis
from studio.schema import read_yaml
from studio.training.commands import launch


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compose", help="Make pictures with several adapters.")(
        with_options(ComposeConfig, skip=["adapters", "regions"])(compose)
    )


def compose(
    fields: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="Configuration file; flags change what it says.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", "-l", metavar=f"{lora_option.FORM}[#PLACE]",
            help="An adapter with its strength, its part of the steps (@0-0.4, or of the noise levels: @sigma=0.6-1) "
            "and its place (as for --region); repeatable.",
            rich_help_panel="Adapters",
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region", "-r", metavar=region_option.FORM,
            help="A part of the picture with its own adapters and prompt; PLACE is left, right, top, bottom, all, "
            "a column (2/3), x0,y0,x1,y1 between 0 and 1, or a mask picture. Repeatable.",
            rich_help_panel="Regions",
        ),
    ] = None,
    regions: Annotated[
        str | None,
        typer.Option(
            "--regions", metavar="auto|none|FILE", rich_help_panel="Regions",
            help="auto: find each adapter's place; or a YAML file with a list of regions.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="NAME=VALUES",
            help="One picture per value, in a labelled grid: an adapter's weight (fox=0:1.2:7 is seven values from 0 "
            "to 1.2), seed=1,2,3, steps, guidance, method or checkpoint. Repeat it for all combinations.",
            rich_help_panel="Output",
        ),
    ] = None,
    sweep_batch: Annotated[
        int,
        typer.Option(
            "--sweep-batch", metavar="N", min=1, max=64, rich_help_panel="Output",
            help=SweepConfig.model_fields["batch"].description,
        ),
    ] = 1,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Repeat a picture (or recipe.json), with the other options changed."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change any value by its place: adapters.0.weight=0.5."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the pictures go: a .png (video: .mp4) file or a folder.",
                                  rich_help_panel="Output"),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Show what would be done without doing it.",
                           rich_help_panel="Output"),
    ] = False,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Make pictures with several adapters."""
    output = Output(json, quiet)
    silence.library_warnings()
    uses, places = region_option.of_adapters(lora or [])
    changes = {**fields, **({"adapters": uses} if uses else {})}
    changes = {**_regions(region, regions, places), **changes}
    chosen, threads = _configuration(config, from_, changes, set_ or [])
    if out is not None and detach:
        raise InputError("--out and --detach exclude each other: the worker keeps its pictures in the job's folder.")
    if from_ is None and not plan and not _says_what(chosen):
        raise InputError('There is nothing to draw: add --prompt ("" for a picture without words).')
    chosen = _checked(chosen)
    if sweep and plan:
        raise InputError("--plan shows how one picture is made: leave --sweep out.")
    if sweep:
        chosen = _swept(chosen, sweep, sweep_batch)
    elif sweep_batch > 1:
        raise InputError("--sweep-batch is for sweeps: say what to vary with --sweep, as in --sweep seed=1,2,3.")
    if plan:
        _show_plan(chosen, output)
    elif detach:
        launch.detach(chosen.kind, chosen, output)
    else:
        _make(chosen, threads, out, output)


def _says_what(config: ComposeConfig) -> bool:
    """Whether there is something to draw: a prompt of the picture or a region, or an empty one given on purpose."""
    parts = config.regions if isinstance(config.regions, list) else []
    return "prompt" in config.model_fields_set or any(part.prompt for part in parts)


def _configuration(
    file: Path | None, picture: Path | None, changes: dict[str, Any], settings: Sequence[str]
) -> tuple[ComposeConfig, int | None]:
    """The requested configuration, and the CPU threads of the picture to repeat."""
    if file is not None and picture is not None:
        raise InputError("Give either a configuration file or --from, not both.")
    if file is not None and not file.suffix and not file.exists():
        raise InputError(f"There is no configuration file '{file}'; give the words of a picture with --prompt.")
    if picture is None:
        values = _with_settings(_with_places({**(read_yaml(file) if file else {}), **changes}), settings)
        return ComposeConfig.parse({**sampler(values), **values}, source=str(file or "compose")), None
    from studio.composition import recipe_png, recipes

    recipe = recipe_png.read_recipe(picture)
    if "regions" in changes and "method" not in changes:
        kept = recipe["config"].get("method")
        changes["method"] = _fitting_method(kept, bool(changes["regions"]))
    whole = [text for text in settings if "." not in text.partition("=")[0]]
    repeated = recipes.replay(recipe, {**changes, **_with_settings({}, whole)}).model_dump(mode="json")
    inside = _with_settings(repeated, [text for text in settings if text not in whole])
    threads = recipe.get("made_on", {}).get("threads")
    return ComposeConfig.parse(inside, source="the recipe"), threads if isinstance(threads, int) else None


def _regions(region: Sequence[str] | None, regions: str | None, own: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of ``--region``, ``--regions`` and the places of adapters (``own``)."""
    if regions and (region or own):
        raise InputError("Give either --regions, or --region and places behind adapters (#PLACE), not both.")
    if regions:
        return region_option.read(regions)
    parts = [*own, *(region_option.parse(text) for text in region or [])]
    return {"regions": parts} if parts else {}


def _fitting_method(kept: Any, regional: bool) -> Any:
    """The recipe's method if it still fits, now that there are regions or none."""
    if (kept in REGIONAL_METHODS) == regional:
        return kept
    return DEFAULT_METHOD if regional else ComposeConfig.model_fields["method"].default


def _with_places(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with every adapter that a region names, from the library if ``adapters`` lacks it."""
    regions = values.get("regions")
    uses = values.get("adapters") or []
    if not isinstance(regions, list) or not isinstance(uses, list):
        return values
    known = {use.get("name") or Path(str(use.get("path", ""))).stem for use in uses if isinstance(use, dict)}
    wanted = [name for region in regions if isinstance(region, dict) for name in region.get("adapters") or []]
    more = [{"name": name, "path": name} for name in dict.fromkeys(map(str, wanted)) if name not in known]
    return {**values, "adapters": [*uses, *more]} if more else values


def _with_settings(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """``values`` after every ``key=value`` of ``--set``."""
    for text in settings:
        place, value = pair("--set", text)
        _put(values, place.split("."), value, place)
    return values


def _put(target: Any, parts: list[str], value: Any, place: str) -> None:
    try:
        for part in parts[:-1]:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if isinstance(target, list):
            target[int(parts[-1])] = value
        else:
            target[parts[-1]] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise InputError(f"--set {place}: there is no such place in the configuration.") from None


def _checked(config: ComposeConfig) -> ComposeConfig:
    """The configuration with its files looked up, so that a wrong name is reported before there is a job."""
    from studio import library
    from studio.composition import job, start_picture

    library.resolve_pipeline(config.base)
    settled = job.settled(start_picture.fitted(config)[0])
    job.worded(settled, 0)
    given = {name: getattr(config, name) for name in (*PICTURES, "width", "height")}
    return settled.model_copy(update=given)  # the job reads the pictures, and reports what it does to them


def _swept(config: ComposeConfig, texts: Sequence[str], batch: int) -> SweepConfig:
    """The sweep of a composition; its last axis runs from left to right."""
    axes = [parse_axis(text) for text in texts]
    swept = SweepConfig.parse({**config.model_dump(mode="json"), "axes": axes, "batch": batch}, source="--sweep")
    for _, one in swept.combinations():  # wrong values are reported before there is a job
        _checked(one)
    return swept


def _show_plan(config: ComposeConfig, output: Output) -> None:
    from studio.composition import job

    planned = job.plan(config)
    output.result(planned.to_dict(), str(planned))


def _make(config: ComposeConfig, threads: int | None, out: Path | None, output: Output) -> None:
    from studio import jobs

    if out is not None:
        _check_place(out)
    if threads:
        import torch

        torch.set_num_threads(threads)
    job = launch.here(lambda terminal: jobs.run_here(config.kind, config, terminal), output)
    result = dict(job.result or {})
    if out is not None:
        made = [result["grid"]] if "grid" in result else result["images"]
        if out.suffix.lower() == ".mp4" and "videos" not in result:
            raise InputError("--out: this base makes pictures, not videos: name a .png file or a folder.")
        if out.suffix.lower() != ".mp4":
            result["images"] = _copied([Path(path) for path in made], out)
        if "videos" in result and out.suffix.lower() != ".png":
            result["videos"] = _copied([Path(path) for path in result["videos"]], out)
    output.result({"job": job.id, **result}, "\n".join(result.get("videos", result["images"])))
    for remark in result["remarks"]:
        output.note(f"Note: {remark}")
    output.note(f"{len(result['images'])} picture(s) in {duration(result['seconds'])}")


def _check_place(out: Path) -> None:
    """Refuse before the work what cannot be written afterwards."""
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: the folder '{folder}' cannot be created ({error.strerror}).") from None
    if out.suffix and out.suffix.lower() not in (".png", ".mp4"):
        raise InputError(
            f"--out: pictures are written as .png (they carry the recipe) and videos as .mp4, got '{out.suffix}'."
        )


def _copied(pictures: list[Path], out: Path) -> list[str]:
    if not out.suffix:
        targets = [out / picture.name for picture in pictures]
    elif len(pictures) == 1:
        targets = [out]
    else:
        targets = [out.with_name(f"{out.stem}-{picture.stem.split('-')[-1]}{out.suffix}") for picture in pictures]
    for picture, target in zip(pictures, targets, strict=True):
        shutil.copyfile(picture, target)
    return [str(target) for target in targets]
