"""``studio reconstruct``: pictures of a scene become cameras and points, if asked after self-calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import InputError
from studio import hush
from studio.cli import launch
from studio.cli.output import Json, Output, Quiet, duration
from studio.cli.schema_options import with_options
from studio.schemas.reconstruct import ReconstructConfig

SUFFIXES = {".glb": "glb", ".ply": "ply", ".npz": "npz"}
FOLDERS = ("colmap", "nerfstudio")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reconstruct", help="Photos in, 3D out: cameras, points, self-calibration.")(
        with_options(ReconstructConfig, skip=["images"])(reconstruct)
    )


def reconstruct(
    fields: dict[str, Any],
    images: Annotated[list[Path], typer.Argument(help="Pictures of one scene, or one video.")],
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out", "-o", metavar="FILE|KIND:FOLDER",
            help="Where the scene goes: .glb, .ply or .npz, colmap:FOLDER or nerfstudio:FOLDER; several times.",
            rich_help_panel="Output",
        ),
    ] = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Photos in, 3D out: cameras, points, self-calibration."""
    from studio import jobs
    from studio import reconstruct as job

    output = Output(json, quiet)
    hush.remarks()
    targets = [_target(text) for text in out or ()]
    given = [str(path.resolve()) for path in images]
    config = ReconstructConfig.parse({**fields, "images": given}, source="reconstruct")
    missing = [path for path in given if not Path(path).is_file()]
    if missing:
        raise InputError(f"There is no picture '{missing[0]}'.")
    output.note(f"Weights {config.model}: {job.licence(config.model)}")
    if detach:
        if targets:
            raise InputError("--out and --detach exclude each other: the worker keeps the scene in the job's folder.")
        launch.detach("reconstruct", config, output)
        return
    done = launch.here(lambda terminal: jobs.run_here("reconstruct", config, terminal), output)
    result = dict(done.result or {})
    written = []
    for kind, place in targets:
        job.export(
            result["scene"], place, kind, config.confidence, config.percentile, config.mesh, config.cameras,
            max_points=config.max_points,
        )  # fmt: skip
        written.append(str(place))
    output.result({"job": done.id, **result, "written": written}, "\n".join(written or [result["glb"]]))
    for text in result["warnings"]:
        output.note(f"Note: {text}")
    output.note(f"{result['points']} points from {result['images']} picture(s) in {duration(result['seconds'])}")


def _target(text: str) -> tuple[str, Path]:
    kind, colon, place = text.partition(":")
    if colon and kind in FOLDERS and place:
        return kind, Path(place)
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out: '{text}' must end in .glb, .ply or .npz, or be colmap:FOLDER or nerfstudio:FOLDER.")
    return SUFFIXES[path.suffix.lower()], path
