"""The composition job: pictures from one prompt with several adapters, each with its whole recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters import files, formats
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, check, part
from studio import catalogue, library
from studio.composition import (
    base_settings,
    canvas_size,
    methods,
    moving,
    pipeline_cache,
    prompts,
    recipes,
    start_picture,
)  # fmt: skip
from studio.composition.region_schema import Region, RegionFields
from studio.composition.schema import ComposeConfig
from studio.library import scan

PREVIEWS = 5
"""How many previews are shown of one picture."""


def run(config: ComposeConfig, folder: Path, monitor: Monitor, threads: int | None = None) -> dict[str, Any]:
    """Make the pictures of ``config`` in ``folder``: ``picture-<seed>.png`` and ``recipe.json``.

    A video is ``video-<seed>.mp4``, and its picture is its middle frame.

    Pictures are made one by one, so that each can be repeated alone and finished ones survive a stop.

    Args:
        threads: CPU threads, for repeating a picture of another machine to the bit.

    Raises:
        adapters.errors.InputError: an adapter, the base or a value cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"base {config.base}"))
    config, remarks = start_picture.fitted(config)
    config = settled(config)
    first, said = worded(config, 0)
    remarks += said
    _set_threads(threads)
    made: list[Made] = []
    layers: dict[str, str] = {}
    with pipeline_cache.pipeline(config, config.task, config.controlnet) as pipe:
        moving.check(pipe, config)
        settings = base_settings.decided(first, pipe)
        config, first = (one.model_copy(update=settings) for one in (config, first))
        config, first = (one.model_copy(update=start_picture.decided(pipe, one)) for one in (config, first))
        whole = config if prompts.open_choices(config) else first.model_copy(update={"images": config.images})
        recipe = {**recipes.build(whole, _made_on(pipe)), **prompts.told(config, whole)}
        files.write_text(folder / "recipe.json", json.dumps(recipe, indent=1))
        for number in range(config.images):
            one, said = worded(config, number)
            remarks += said
            if not made or one.adapters != made[-1].config.adapters or one.regions != made[-1].config.regions:
                _prepare(pipe, one)
                layers |= _layers(pipe)
            made.append(_picture(pipe, config, one, folder, monitor, number))
        if config.fold and not all(picture.config.fold for picture in made):
            recipe["config"]["fold"] = False
            files.write_text(folder / "recipe.json", json.dumps(recipe, indent=1))
    remarks += [remark for picture in made for remark in picture.remarks]
    return _result(config, recipe, folder, made, remarks, round(time.monotonic() - begun, 3), layers)


def run_together(configs: Sequence[ComposeConfig], folders: Sequence[Path], monitor: Monitor) -> list[dict[str, Any]]:
    """Make one picture of each of ``configs`` in one batch; they differ only in seeds and strengths.

    Each is the picture that :func:`run` makes up to rounding, and its recipe says how large the batch was. Results are
    those of :func:`run`.

    Raises:
        adapters.errors.InputError: as :func:`run`; or they cannot share a batch.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    begun = time.monotonic()
    monitor.report(Progress("loading", message=f"base {configs[0].base}"))
    known = [worded(settled(config), 0) for config in configs]
    strengths = [{use.name: use.strengths for use in one.adapters} for one, _ in known]
    varied = any(one != strengths[0] for one in strengths)
    from pipelines.diffusion.drawing import generators

    with pipeline_cache.pipeline(configs[0]) as pipe:
        ones = [one.model_copy(update=base_settings.decided(one, pipe)) for one, _ in known]
        if any(shared(one) != shared(ones[0]) for one in ones) or ones[0].task or ones[0].regions:
            raise InputError("Only pictures without regions that differ in seed and strengths can share a batch.")
        _prepare(pipe, ones[0])
        layers = _layers(pipe)
        check(monitor)
        moving.check(pipe, ones[0])
        out = pipe(
            ones[0].prompt, **_arguments(ones[0]), **moving.arguments(pipe, ones[0]), images=len(ones), monitor=monitor,
            generator=generators([one.seed for one in ones]), strengths=strengths if varied else (),
        )  # fmt: skip
        made_on, rate = {**_made_on(pipe), "batch": len(ones)}, moving.rate(pipe, ones[0])
    seconds = round((time.monotonic() - begun) / len(ones), 3)
    results = []
    for k, (config, one, (_, remarks), folder) in enumerate(zip(configs, ones, known, folders, strict=True)):
        if varied or out.plan.folds.missing:
            one = one.model_copy(update={"fold": False})
        recipe = {**recipes.build(one, made_on), **prompts.told(config, one)}
        files.write_text(folder / "recipe.json", json.dumps(recipe, indent=1))
        path, video, said = moving.save(out, k, folder / f"picture-{one.seed}.png", rate, recipe)
        monitor.report(Progress("saved", k + 1, len(ones), preview=path, message=f"picture {path.name}"))
        made = Made(one, path, [], (*remarks, *out.plan.warnings, *said), video)
        results.append(_result(config, recipe, folder, [made], made.remarks, seconds, layers))
    return results


def shared(config: ComposeConfig) -> dict[str, Any]:
    """The values that pictures of one batch share; strengths of adapters only where the method is a constant sum."""
    values = config.model_dump(exclude={"seed"})
    if methods.known(config.method).constant:
        values["adapters"] = [{**use, "weight": None, "te_weight": None} for use in values["adapters"]]
    return values


@dataclass(frozen=True)
class Made:
    """A picture: its configuration, file, regions' places and remarks; of a video, its file too."""

    config: ComposeConfig
    path: Path
    regions: list[dict[str, Any]]
    remarks: tuple[str, ...]
    video: Path | None = None


def _result(
    config: ComposeConfig,
    recipe: dict[str, Any],
    folder: Path,
    made: Sequence[Made],
    remarks: Sequence[str],
    seconds: float,
    layers: dict[str, str],
) -> dict[str, Any]:
    """The job's result; ``layers`` says what every adapter changes."""
    return {
        "images": [str(picture.path) for picture in made],
        **({"videos": [str(picture.video) for picture in made]} if made[0].video else {}),
        "regions": made[0].regions,
        "recipe": str(folder / "recipe.json"),
        "adapters": [use.name for use in made[0].config.adapters],
        "layers": layers,
        "base": config.base,
        "method": config.method,
        "made_on": recipe["made_on"],
        "remarks": list(dict.fromkeys(remarks)),
        "seconds": seconds,
    }


def plan(config: ComposeConfig) -> Any:
    """What :func:`run` would do, as a :class:`pipelines.diffusion.report.Plan`; makes no picture."""
    config, remarks = start_picture.fitted(config)
    config, said = worded(settled(config), 0)
    remarks += said
    with pipeline_cache.pipeline(config, config.task, config.controlnet) as pipe:
        moving.check(pipe, config)
        _prepare(pipe, config)
        config = config.model_copy(update=base_settings.decided(config, pipe))
        part = {"strength": config.strength} if config.strength is not None else start_picture.decided(pipe, config)
        made = pipe.plan(config.steps, config.guidance_scale, config.scheduler, config.prompt, **part)
        return replace(made, warnings=(*remarks, *made.warnings))


def worded(config: ComposeConfig, number: int) -> tuple[ComposeConfig, list[str]]:
    """The settled ``config`` for picture ``number`` (wildcards chosen, adapters from the prompt added), and remarks.

    Raises:
        InputError: syntax in a text that is not supported; no such adapter or wildcard.
    """
    one, said = prompts.with_named(prompts.decided(config, config.seed + number))
    one = one.model_copy(update={"seed": config.seed + number, "images": 1})
    return (one if one.adapters == config.adapters else settled(one)), said


def settled(config: ComposeConfig) -> ComposeConfig:
    """``config`` made complete: every adapter has a name and its trigger words, masks are included.

    A missing name is taken from the file, made unique by a number; missing triggers come from the library. A mask's
    file is read now and stored as a ``data:`` URI, so that the recipe repeats without the file.

    Raises:
        InputError: there is no such method or adapter, or the picture cannot fit in memory.
    """
    catalogue.check(config.method, "compose")
    canvas_size.check_fits(config)
    taken = {use.name for use in config.adapters}
    uses = []
    for use in config.adapters:
        name = use.name or _free(Path(use.path).stem or "adapter", taken)
        taken.add(name)
        place = library.resolve_adapter(use.path)
        triggers = use.triggers or list(scan.record(place, "adapter").triggers)
        uses.append(use.model_copy(update={"name": name, "triggers": triggers}))
    regions = config.regions if config.regions == "auto" else [_with_mask(region) for region in config.regions]
    return config.model_copy(update={"adapters": uses, "regions": regions})


def _with_mask(region: Region) -> Region:
    if not region.mask:
        return region
    from pipelines.diffusion.regions.pictures import open_mask
    from pipelines.pictures import as_uri

    return region.model_copy(update={"mask": as_uri(open_mask(region.mask))})


def _free(name: str, taken: set[str]) -> str:
    return next(text for text in (name, *(f"{name}-{number}" for number in range(2, 999))) if text not in taken)


def _prepare(pipe: Any, config: ComposeConfig) -> None:
    """Load and compose its adapters, replacing earlier ones."""
    for name in list(pipe.adapters):
        pipe.unload_lora(name)
    for use in config.adapters:
        file = formats.read(library.resolve_adapter(use.path), recipes.known_hash)
        pipe.load_lora(
            file, name=use.name, weight=use.weight, te_weight=use.te_weight, triggers=tuple(use.triggers),
            blocks=use.blocks or None, schedule=list(use.schedule) or None, schedule_by=use.schedule_by,
            denoiser=use.denoiser,
        )  # fmt: skip
    pipe.compose(
        config.method, adapters=[use.name for use in config.adapters], tau=config.tau, te_mode=config.te_mode,
        adapter_batch=config.adapter_batch, regions=_regions(config), fold=config.fold,
        **{name: getattr(config, name) for name in RegionFields.model_fields if name != "regions"},
    )  # fmt: skip


def _regions(config: ComposeConfig) -> Any:
    """The regions in the pipeline's form."""
    if config.regions == "auto":
        return "auto"
    return [{**region.model_dump(), "mask": region.mask or None} for region in config.regions]


def _picture(
    pipe: Any, whole: ComposeConfig, config: ComposeConfig, folder: Path, monitor: Monitor, number: int
) -> Made:
    """Make picture ``number`` of the series ``whole``; ``config`` is for this picture."""
    check(monitor)
    out = pipe(
        config.prompt, **_arguments(config), seed=config.seed, images=1, monitor=part(monitor, number, whole.images),
        **moving.arguments(pipe, config), **start_picture.arguments(pipe, config),
    )  # fmt: skip
    if out.plan.folds.missing:  # there was no room for it, and may be where the recipe is repeated
        config = config.model_copy(update={"fold": False})
    recipe = {**recipes.build(config, _made_on(pipe)), **prompts.told(whole, config)}
    if config.mask:
        out.images[0] = start_picture.kept(config, out.images[0])
    picture = folder / f"picture-{config.seed}.png"
    path, video, said = moving.save(out, 0, picture, moving.rate(pipe, config), recipe)
    places = [_place(region, folder, config.seed, i) for i, region in enumerate(out.regions, 1)]
    monitor.report(Progress("saved", number + 1, whole.images, preview=path, message=f"picture {path.name}"))
    return Made(config, path, places, (*out.plan.warnings, *said), video)


def _arguments(config: ComposeConfig) -> dict[str, Any]:
    """Arguments of a call that pictures of a batch share, besides the prompt."""
    return {
        "negative_prompt": config.negative_prompt, "steps": config.steps, "guidance_scale": config.guidance_scale,
        "width": config.width, "height": config.height, "scheduler": config.scheduler,
        "preview_every": max(1, (config.steps or 1) // PREVIEWS), "allow_double_guidance": config.allow_double_guidance,
        "frames": config.frames,
    }  # fmt: skip


def _layers(pipe: Any) -> dict[str, str]:
    """Adapter -> which share of the base's layers it changes."""
    from adapters.formats.coverage import told

    return {name: told(report.coverage) for name, report in pipe.adapters.items()}


def _place(region: Any, folder: Path, seed: int, number: int) -> dict[str, Any]:
    """A region for the job's result; the mask of one without a box is written as a picture."""
    mask = None
    if region.box is None:
        mask = folder / f"region-{seed}-{number}.png"
        files.write(mask, region.mask.save, sync=False)
    return {"name": region.name, "box": region.box and list(region.box), "mask": mask and str(mask)}


def _made_on(pipe: Any) -> dict[str, Any]:
    import torch

    chosen = pipe.settings
    return {
        "family": chosen.family,
        "device": chosen.device,
        "dtype": chosen.dtype,
        "attention": chosen.attention,
        "threads": torch.get_num_threads(),
    }


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
