"""``studio reconstruct``: pictures of a scene become cameras and points, optionally after self-calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio import silence
from studio.cli.output import Json, Output, Quiet, duration
from studio.cli.schema_options import with_options
from studio.reconstruction.schema import ReconstructConfig
from studio.training.commands import launch

SUFFIXES = {".glb": "glb", ".ply": "ply", ".npz": "npz"}
FOLDERS = ("colmap", "nerfstudio")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reconstruct", help="Photos in, 3D out: cameras, points, self-calibration.")(
        with_options(ReconstructConfig, skip=["images", "also"])(reconstruct)
    )


def reconstruct(
    fields: dict[str, Any],
    images: Annotated[
        list[Path], typer.Argument(help="Pictures of one scene, one video, or a folder per scene, done in turn.")
    ],
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out", "-o", metavar="FILE|KIND:FOLDER",
            help="Where the scene goes: .glb, .ply or .npz, colmap:FOLDER or nerfstudio:FOLDER; repeatable. Each of "
            "several scenes gets a folder of its name there.",
            rich_help_panel="Output",
        ),
    ] = None,
    one_adapter: Annotated[
        bool,
        typer.Option(
            "--one-adapter", help="With --calibrate and several scenes: one adapter learns from all.",
            rich_help_panel="Calibrate to this scene",
        ),
    ] = False,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Photos in, 3D out: cameras, points, self-calibration."""
    from studio.reconstruction import job

    output = Output(json, quiet)
    silence.library_warnings()
    targets = [_target(text) for text in out or ()]
    scenes = _scenes(images)
    configs = [
        ReconstructConfig.parse({**fields, "images": given, **({"name": name} if name else {})}, source="reconstruct")
        for name, given in scenes.items()
    ]
    if one_adapter:
        if len(configs) < 2 or not configs[0].calibrate:
            raise InputError("--one-adapter needs --calibrate and the folders of two scenes or more.")
        configs[0].also = [str(folder.resolve()) for folder in images[1:]]
    output.note(f"Weights {configs[0].model}: {job.licence(configs[0].model)}")
    if detach:
        if targets or one_adapter:
            raise InputError("--detach excludes --out and --one-adapter: the worker keeps each scene's files.")
        for config in configs:
            launch.detach("reconstruct", config, output)
        return
    done: list[dict[str, Any]] = []
    for config in configs:
        if done:
            output.note("")
        if done and one_adapter:
            config = config.model_copy(update={"calibrate": False, "adapter": done[0]["adapter"]})
        places = [(kind, _own(place, config.name) if len(configs) > 1 else place) for kind, place in targets]
        done.append(_one(config, places, output))
    if json:
        output.result(done[0] if len(done) == 1 else {"scenes": done}, "")


def _one(config: ReconstructConfig, targets: list[tuple[str, Path]], output: Output) -> dict[str, Any]:
    """Reconstruct one scene here, write the requested files and report the result."""
    from studio import jobs
    from studio.reconstruction import job

    done = launch.here(lambda terminal: jobs.run_here("reconstruct", config, terminal), output)
    result = dict(done.result or {})
    written = []
    for kind, place in targets:
        made = job.export(
            result["scene"], place, kind, config.confidence, config.percentile, config.mesh, config.cameras,
            max_points=config.max_points, originals=result["files"],
        )  # fmt: skip
        written.append(str(place))
        result["warnings"] = [*result["warnings"], *(f"{place.name}: {text}" for text in made.notes)]
    if not output.json:
        output.result({}, "\n".join(written or [result["glb"]]))
    for text in result["warnings"]:
        output.note(f"Note: {text}")
    output.note(
        f"{config.name}: {result['points']} points from {result['images']} picture(s) in {duration(result['seconds'])}"
    )
    return {"job": done.id, "name": config.name, **result, "written": written}


def _scenes(given: list[Path]) -> dict[str, list[str]]:
    """Pictures by scene: one without a name, or the given folders by theirs.

    Raises:
        InputError: something is missing, folders are mixed with files, or two folders have one name.
    """
    from studio.reconstruction.job import pictures_in

    missing = [path for path in given if not path.exists()]
    if missing:
        raise InputError(f"There is no picture '{missing[0].resolve()}'.")
    folders = [path for path in given if path.is_dir()]
    if not folders:
        return {"": [str(path.resolve()) for path in given]}
    if len(folders) < len(given):
        raise InputError("Give either the pictures of one scene or a folder per scene, not both.")
    names = [folder.resolve().name for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two folders are named '{twice}': scenes are named after their folder, so rename one.")
    return {name: pictures_in(folder) for name, folder in zip(names, folders, strict=True)}


def _own(place: Path, scene: str) -> Path:
    """The output path of one of several scenes: in a folder of its name."""
    return place.parent / scene / place.name


def _target(text: str) -> tuple[str, Path]:
    kind, colon, place = text.partition(":")
    if colon and kind in FOLDERS and place:
        return kind, Path(place)
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out: '{text}' must end in .glb, .ply or .npz, or be colmap:FOLDER or nerfstudio:FOLDER.")
    return SUFFIXES[path.suffix.lower()], path
