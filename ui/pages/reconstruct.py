"""Reconstruct: photos of a scene in, 3D out; the model can be calibrated to the scene first."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import jobs
from studio.jobs import Job
from studio.reconstruction import job as work
from studio.reconstruction.schema import ReconstructConfig
from ui import markup
from ui.components import job_panel, loss_plot, schema_form
from ui.errors import errors_shown, say
from ui.events import PRIVATE

KNOWN = schema_form.fields(ReconstructConfig)
NAMES = tuple(name for name in KNOWN if name not in ("images", "also"))  # paths are for commands
CALIBRATION = ("rank", "preset", "epochs", "lr", "mu", "cutoff", "share", "seed")
ADVANCED = (
    "name", "size", "graph", "many", "verify", "steps", "schedule", "chunk", "seconds_per_frame", "dtype", "device",
)  # fmt: skip
OUTPUT = ("confidence", "percentile", "mesh", "cameras", "max_points")
SECONDS = 0.8
MODELS = [
    "dust3r-tiny",
    *(f"naver/DUSt3R_ViTLarge_BaseDecoder_{kind}" for kind in ("512_dpt", "512_linear", "224_linear")),
]

SURFACES = {"automatic": None, "surfaces": True, "points": False}
"""How a scene is drawn, and the value of ``mesh`` for it."""
Form = dict[str, Any]


@dataclass
class Page:
    """What other pages may fill."""

    form: Form
    view: list[Any]
    """Components that :func:`follow` fills."""


@dataclass
class _Result:
    job: gr.State
    shown: gr.State
    timer: gr.Timer
    panel: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    body: gr.Column
    beside: gr.Column
    before: gr.Model3D
    after: gr.Model3D
    flight: gr.Image
    depth: gr.Gallery
    gallery: gr.Gallery
    table: gr.HTML
    frame: gr.Dropdown
    points: gr.HTML

    @property
    def view(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.cancel, self.resume, self.body, self.beside,
                self.before, self.after, self.flight, self.depth, self.gallery, self.table, self.frame,
                self.points]  # fmt: skip


def build() -> Page:
    """Draw the page inside the current tab."""
    form: Form = {}
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=4, min_width=320, elem_classes="as-form"):
            drop, sample, chosen = _pictures()
            _settings(form)
            with gr.Row(elem_classes="as-actions"):
                start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-start", scale=3)
                cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="reconstruct-cancel", scale=1)
        with gr.Column(scale=8, min_width=320, elem_id="reconstruct-result"):
            result = _draw_result(form, cancel)
    page = Page(form, result.view)
    _wire_pictures(drop, sample, chosen)
    _wire_run(page, result, drop, start)
    return page


# ------------------------------------------------------------------------------------------------ the settings


def _pictures() -> tuple[gr.File, gr.Button, gr.Gallery]:
    with gr.Group(elem_classes="as-card"):
        drop = gr.File(
            label="Photos of one scene, or a video", file_count="multiple", height=230, elem_id="reconstruct-drop",
            file_types=["image", "video"],
        )  # fmt: skip
        chosen = gr.Gallery(label="Pictures", show_label=False, columns=4, height="auto", visible=False,
                            interactive=False, object_fit="cover", buttons=[])  # fmt: skip
        sample = gr.Button("Use the sample scene", size="md", elem_id="reconstruct-sample")
    return drop, sample, chosen


def _settings(form: Form) -> None:
    with gr.Group(elem_classes="as-card"):
        form["model"] = gr.Dropdown(MODELS, value=KNOWN["model"].default, label="Model", allow_custom_value=True,
                                    info=KNOWN["model"].help, elem_id="reconstruct-model",
                                    interactive=True)  # fmt: skip
        said = gr.HTML(_licence(KNOWN["model"].default), elem_classes="as-help", apply_default_css=False)
        form["accept_licence"] = schema_form.widget(
            KNOWN["accept_licence"], label="I accept this licence", info=None, elem_id="reconstruct-licence",
            visible=_restricted(KNOWN["model"].default),
        )  # fmt: skip
        form["adapter"] = gr.Dropdown(
            adapter_choices(), value="", label="Adapter of a scene", allow_custom_value=True, interactive=True,
            info=KNOWN["adapter"].help, elem_id="reconstruct-adapter",
        )  # fmt: skip
    form["model"].change(
        lambda name: (_licence(str(name)), gr.update(visible=_restricted(str(name)), value=False)), form["model"],
        [said, form["accept_licence"]], **PRIVATE,
    )  # fmt: skip
    with gr.Group(elem_classes="as-card"):
        form["calibrate"] = schema_form.widget(KNOWN["calibrate"], label="Calibrate to this scene", elem_id="calibrate")
        with gr.Accordion("How to calibrate", open=False, elem_classes="as-more"):
            for name in CALIBRATION:
                form[name] = schema_form.widget(KNOWN[name], elem_id=f"reconstruct-{name}")
    with gr.Accordion("Advanced", open=False, elem_classes="as-more"):
        for name in ADVANCED:
            form[name] = schema_form.widget(KNOWN[name], elem_id=f"reconstruct-{name}")


def _licence(model: str) -> str:
    try:
        said = work.licence(model)
    except InputError as error:
        said = str(error)
    return f"<p>Licence of these weights: {markup.text(said)}</p>"


def _restricted(model: str) -> bool:
    try:
        return work.restricted(model)
    except InputError:
        return False


def adapter_choices() -> list[tuple[str, str]]:
    """Adapters made by earlier reconstructions and trainings, newest first of each."""
    made = [job for kind in ("reconstruct", "train-scene") for job in jobs.list(100, (), kind)]
    found = [job for job in made if (job.result or {}).get("adapter")]
    return [
        ("none", ""),
        *((f"{job.config.get('name')}   {job.id}", str((job.result or {})["adapter"])) for job in found),
    ]


# ------------------------------------------------------------------------------------------------ the result


_EMPTY = markup.empty(
    "Your scene appears here",
    "Give three or more photos of one scene from different places, or try the sample scene, and press Reconstruct.",
)


def _draw_result(form: Form, cancel: gr.Button) -> _Result:
    job, shown = gr.State(""), gr.State(())
    timer = gr.Timer(SECONDS, active=False)
    panel = gr.HTML(_EMPTY, elem_id="reconstruct-panel", apply_default_css=False)
    resume = gr.Button("Resume", visible=False, size="md", elem_id="reconstruct-resume")
    with gr.Column(visible=False) as body:
        with gr.Row():
            # The viewer's file is turned and scaled for this place: pipelines/geometry/previews.py.
            looks: dict[str, Any] = {"clear_color": (0.93, 0.93, 0.95, 1.0), "height": 420, "interactive": False,
                                     "camera_position": work.VIEW_FROM}  # fmt: skip
            with gr.Column(visible=False, min_width=150) as beside:
                before = gr.Model3D(label="Before calibration", elem_id="scene-before", **looks)
            with gr.Column(min_width=150, scale=2):
                after = gr.Model3D(label="Scene", elem_id="scene-after", **looks)
            with gr.Column(min_width=200, scale=1):
                flight = gr.Image(label="Fly-around", type="filepath", interactive=False, height=200,
                                  elem_id="scene-flight", buttons=["download", "fullscreen"])  # fmt: skip
                depth = gr.Gallery(label="Depth", columns=3, height=204, interactive=False, object_fit="contain",
                                   elem_id="scene-depth", buttons=["fullscreen"])  # fmt: skip
        points = gr.HTML("", elem_id="scene-points", elem_classes="as-help", apply_default_css=False)
        with gr.Group(elem_classes="as-card"):
            with gr.Row():
                form["percentile"] = gr.Slider(
                    0, 95, KNOWN["percentile"].default, step=1, label="Drop least confident, %",
                    elem_id="scene-percentile", min_width=150,
                )  # fmt: skip
                form["confidence"] = gr.Slider(1, 20, KNOWN["confidence"].default, step=0.1, label="Minimum confidence",
                                               elem_id="scene-confidence", min_width=150)  # fmt: skip
                size = gr.Slider(1, 20, 5, step=1, label="Camera size, %", min_width=150)
            with gr.Row():
                form["mesh"] = gr.Dropdown(list(SURFACES), value="automatic", label="Drawn as", min_width=130,
                                           interactive=True, elem_id="scene-mesh")  # fmt: skip
                frame = gr.Dropdown([("All pictures", -1)], value=-1, label="Shown", min_width=130, interactive=True)
                hide = gr.Dropdown(["nothing", "black", "white", "sky"], value="nothing", label="Hide background",
                                   min_width=130, interactive=True, elem_id="scene-hide")  # fmt: skip
                form["max_points"] = schema_form.widget(
                    KNOWN["max_points"], label="Maximum points", info=None, min_width=130
                )
            with gr.Row():
                form["cameras"] = schema_form.widget(KNOWN["cameras"], label="Cameras", info=None, min_width=130)
                clean = gr.Checkbox(False, label="Clean depth", min_width=130, interactive=True,
                                    elem_id="scene-clean")  # fmt: skip
        with gr.Row(elem_classes="as-actions-row"):
            kind = gr.Dropdown(list(work.EXPORTS), value="glb", label="Download as", min_width=120, interactive=True,
                               elem_id="scene-kind")  # fmt: skip
            make = gr.Button("Prepare the file", size="md", elem_id="scene-export")
            download = gr.DownloadButton("Download", size="md", interactive=False, elem_id="scene-download")
        with gr.Accordion("Picture, depth and confidence of every photo", open=False, elem_classes="as-more"):
            gallery = gr.Gallery(show_label=False, columns=6, height="auto", interactive=False,
                                 object_fit="contain", elem_id="scene-pictures",
                                 buttons=["download", "fullscreen"])  # fmt: skip
        table = gr.HTML("", apply_default_css=False, elem_id="scene-cameras")
    result = _Result(
        job,
        shown,
        timer,
        panel,
        cancel,
        resume,
        body,
        beside,
        before,
        after,
        flight,
        depth,
        gallery,
        table,
        frame,
        points,
    )
    controls = [
        form["confidence"],
        form["percentile"],
        form["mesh"],
        form["cameras"],
        size,
        frame,
        hide,
        form["max_points"],
        clean,
    ]

    @errors_shown
    def show(job_id: str, *values: Any) -> Any:
        if not job_id:
            return gr.skip()
        file, count, _ = exported(jobs.get(job_id), "view", values)
        return gr.update(value=str(file)), _count(count)

    @errors_shown
    def prepare(job_id: str, wanted: str, *values: Any) -> Any:
        file, _, notes = exported(jobs.get(job_id), wanted, values)
        for text in notes:
            say(text, title="Note")
        return gr.update(value=str(file), interactive=True)

    for control in controls:
        event = control.release if isinstance(control, gr.Slider) else control.input
        event(show, [job, *controls], [after, points], show_progress="minimal", api_visibility="private",
              concurrency_limit=1)  # fmt: skip
    make.click(prepare, [job, kind, *controls], download, **PRIVATE)
    # An earlier file does not have the settings shown now.
    gr.on([after.change, kind.input], lambda: gr.update(interactive=False), None, download, **PRIVATE)
    return result


def _count(points: int) -> str:
    return f"<p>{points:,} points</p>"


def exported(job: Job, kind: str, values: Sequence[Any]) -> tuple[Path, int, list[str]]:
    """Export a finished scene with other settings: the file, its number of points, and notes.

    Equal settings give the same file.
    """
    confidence, percentile, mesh, cameras, size, frame, hide, limit, clean = values
    result = job.result or {}
    scene = Path(result.get("scene", ""))
    if not scene.is_file():
        raise InputError("There is no finished scene yet.")
    name = hashlib.sha256(repr((kind, *values)).encode()).hexdigest()[:12]
    folder = job.folder / "exports"
    folder.mkdir(exist_ok=True)
    whole = kind in ("colmap", "nerfstudio")
    target = folder / (f"{kind}-{name}" if whole else f"scene-{name}.{'glb' if kind == 'view' else kind}")
    file, about = target.with_suffix(".zip") if whole else target, target.with_suffix(".json")
    if not file.is_file() or not about.is_file():
        number = None if frame is None or int(frame) < 0 else int(frame)
        made = work.export(
            scene, target, kind, float(confidence), float(percentile), SURFACES[str(mesh)], bool(cameras),
            float(size), number, str(hide), int(limit), bool(clean), result.get("files", ()),
        )  # fmt: skip
        if whole:
            shutil.make_archive(str(target), "zip", target)
        about.write_text(json.dumps({"points": made.points, "notes": made.notes}))
    said = json.loads(about.read_text())
    return file, int(said["points"]), list(said["notes"])


# ------------------------------------------------------------------------------------------------ at work


def sample_scene() -> list[str]:
    """The pictures of the shipped scene."""
    import assets

    try:
        return sorted(str(file) for file in assets.path("scenes/room").glob("*.png"))
    except FileNotFoundError:
        raise InputError("The sample scene is not in this installation.") from None


def _wire_pictures(drop: gr.File, sample: gr.Button, chosen: gr.Gallery) -> None:
    def gallery(paths: Any) -> Any:
        shown = [str(path) for path in paths or () if Path(path).suffix.lower() not in work.VIDEOS]
        return gr.update(value=shown, visible=bool(shown))

    @errors_shown
    def take_sample() -> Any:
        paths = sample_scene()
        return paths, gallery(paths)

    drop.change(gallery, drop, chosen, **PRIVATE)
    sample.click(take_sample, None, [drop, chosen], **PRIVATE)


def _wire_run(page: Page, result: _Result, drop: gr.File, start: gr.Button) -> None:
    fields = [page.form[name] for name in NAMES]

    @errors_shown
    def begin(paths: Any, *values: Any) -> Any:
        config = schema_form.read_all(KNOWN, NAMES, values)
        config["adapter"] = config["adapter"] or ""
        config["mesh"] = SURFACES[str(values[NAMES.index("mesh")])]
        parsed = ReconstructConfig.parse({**config, "images": [str(path) for path in paths or ()]}, source="the form")
        if not parsed.images:
            raise InputError("There are no pictures yet: drop some, or use the sample scene.")
        job_id = jobs.submit("reconstruct", parsed)
        jobs.ensure_worker()
        return follow(job_id, ())

    start.click(begin, [drop, *fields], page.view, **PRIVATE)
    area = job_panel.Area(result.job, result.timer, result.cancel, page.view, result.resume, result.shown)
    job_panel.steer(area, follow, follow_nothing)


def follow_nothing() -> list[Any]:
    """The empty page."""
    return [
        "",
        (),
        gr.Timer(active=False),
        _EMPTY,
        gr.update(visible=False),
        gr.update(visible=False),
        gr.update(visible=False),
        *([gr.skip()] * 9),
    ]


def follow(job_id: str, shown: tuple[Any, ...]) -> Any:
    """The right side for a job; nothing changes while ``shown`` is up to date.

    A finished scene comes in two steps, first the viewers, then their contents: a viewer that appears together with
    its scene stays empty (Gradio 6.31).
    """
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    now = (job.id, job.status, job.progress.step if job.progress else 0, job.progress.stage if job.progress else "")
    laid_out = (*now, "laid out")
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    result = job.result or {}
    ready = job.status == "done" and Path(result.get("glb", "")).is_file()
    first = ready and tuple(shown)[: len(laid_out)] != laid_out
    before = result.get("before", "")
    head = [
        job_id, (*laid_out, bool(shown)) if first else now, gr.Timer(active=job.active or first),
        job_panel.job_panel(job, job_panel.ahead(job)) + ("" if ready else loss_plot.of_job(job)),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Cancel"),
        gr.update(visible=job.status in ("cancelled", "interrupted", "failed")),
        gr.update(visible=ready), gr.update(visible=bool(before)),
    ]  # fmt: skip
    if first or not ready:
        return [*head, *([gr.skip()] * 8)]
    if shown[-1]:  # it was watched
        for sentence in result.get("warnings", ()):
            say(sentence, title="Note")
    names = [camera["picture"] for camera in result["cameras"]]
    pictures = [path for path in result["pictures"] if Path(path).is_file()]
    return [
        *head, before or None,
        gr.update(value=_there(result, "view") or result["glb"], label="After calibration" if before else "Scene"),
        _there(result, "flight"), [path for path in pictures if Path(path).name.startswith("depth-")], pictures,
        _table(result),
        gr.update(choices=[("All pictures", -1), *((name, n) for n, name in enumerate(names))], value=-1),
        _count(result["points"]),
    ]  # fmt: skip


def _there(result: dict[str, Any], name: str) -> str | None:
    """A file of the result; jobs of earlier versions have fewer."""
    place = result.get(name, "")
    return place if place and Path(place).is_file() else None


def _table(result: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{markup.text(c['picture'])}</td><td>{c['focal']}</td>"
        f"<td>{', '.join(f'{x:.3f}' for x in c['centre'])}</td></tr>"
        for c in result["cameras"]
    )
    head = "<tr><th>Picture</th><th>Focal, px</th><th>Camera centre</th></tr>"
    return f'<table class="as-table">{head}{rows}</table>'
