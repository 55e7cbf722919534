"""Compose: one prompt, several adapters, one method; pictures with their recipes."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.errors import InputError
from studio import catalogue, jobs, library
from studio.composition import base_settings, gallery, methods, moving, recipe_png, recipes, save_mix
from studio.composition.comparison_schema import CompareConfig
from studio.composition.picture_schema import PictureFields
from studio.composition.region_schema import RegionFields
from studio.composition.schema import ComposeConfig
from studio.composition.sweep_schema import SweepConfig, parse_axis
from studio.jobs import Job
from studio.library import base_families
from ui import markup
from ui.components import advice, canvas, faces, job_panel, picture_list, rack, remembered, schema_form, start
from ui.components.advice import Advice
from ui.components.pick_list import pick_list, picked
from ui.components.rack import Row
from ui.components.start import Start
from ui.errors import errors_shown, say
from ui.events import PRIVATE
from ui.pages import compose_regions
from ui.pages.compose_regions import Where

KNOWN = schema_form.fields(ComposeConfig)
SWEPT = schema_form.fields(SweepConfig)
_ELSEWHERE = {"adapters", *RegionFields.model_fields, *PictureFields.model_fields}
NAMES = tuple(name for name in KNOWN if name not in _ELSEWHERE)
"""Fields with a widget of their own, in the order of the form; the adapters are the rack."""

ADVANCED = ("scheduler", "te_mode", "adapter_batch", "fold", "allow_double_guidance", "memory", "dtype", "attention",
            "device", "family", "quantization", "denoiser")  # fmt: skip
SECONDS = 0.7
EARLIER = 12
"""How many earlier pictures are offered beside the form."""

Form = dict[str, Any]
"""Widgets by field name."""


@dataclass
class Page:
    """What other pages may fill."""

    form: Form
    rack: gr.HTML
    picker: gr.Dropdown
    new_seed: gr.Checkbox
    where: Where
    start: Start
    compare: Compare
    advice: Advice
    view: list[Any]
    """Components that :func:`follow` fills."""
    suited: gr.State
    """The distilled adapter that the settings suit."""

    @property
    def kept(self) -> list[Any]:
        """What survives a reload, see :func:`restore`."""
        return [*(self.form[name] for name in NAMES), *self.start.inputs, self.rack, self.new_seed, self.compare.on,
                self.compare.methods, *self.where.inputs]  # fmt: skip

    @property
    def outputs(self) -> list[gr.components.Component]:
        """Every setting: the fields in the order of :data:`NAMES`, the start picture, the rack, whether each run gets a
        new seed, whether methods are compared, where adapters act."""
        return [*(self.form[name] for name in NAMES), *self.start.outputs, self.rack, self.new_seed,
                *self.compare.outputs, *self.where.outputs, *self.where.options.values()]  # fmt: skip


@dataclass
class Compare:
    """Several methods at once."""

    on: gr.Checkbox
    methods: gr.CheckboxGroup
    one: gr.Column
    """The settings of a single method."""

    sweep: gr.Textbox
    """What to vary, one setting per line."""

    batch: gr.components.Component
    """Pictures of a sweep made at once."""

    @property
    def outputs(self) -> list[Any]:
        return [self.on, self.methods, self.one]


def build() -> Page:
    """Draw the page inside the current tab."""
    with gr.Row(elem_classes="as-page"):
        with gr.Column(scale=5, min_width=320, elem_classes="as-form"):
            settings = _settings()
            with gr.Row(elem_classes="as-actions"):
                generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="compose-cancel", scale=1)
        with gr.Column(scale=7, min_width=320, elem_id="compose-result"):
            result = _Result.draw()
    page = Page(*settings, [*result.followed, cancel], gr.State(""))
    _wire_rack(page)
    _wire_where(page)
    _wire_run(page, result, generate, cancel)
    _wire_recipes(page, result)
    return page


# ------------------------------------------------------------------------------------------------ the settings


def _settings() -> tuple[Form, gr.HTML, gr.Dropdown, gr.Checkbox, Where, Start, Compare, Advice]:
    form: Form = {}
    with gr.Group(elem_classes="as-card"):
        form["prompt"] = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=8,
            placeholder="a flat icon of a red apple left of a dog",
            elem_id="prompt",
            value="",
            info="Shift + Enter generates.",
        )
        form["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=4, value="",
                                             placeholder="what to avoid (optional)")  # fmt: skip
    with gr.Group(elem_classes="as-card"):
        picker = gr.Dropdown(
            adapter_choices(), value=None, label="Adapters",
            info="Choose from your library; their order matters for switch.",
            elem_id="adapter-picker", elem_classes=faces.MENU, interactive=True,
        )  # fmt: skip
        adapters = rack.rack()
        doctor = advice.draw()
    with gr.Group(elem_classes="as-card"):
        where = compose_regions.draw()
    begin = start.draw()
    with gr.Group(elem_classes="as-card"):
        compare = _method_settings(form)
    with gr.Group(elem_classes="as-card"):
        new_seed = _picture_settings(form)
    with gr.Accordion("Advanced", open=False, elem_classes="as-more"):
        for name in ADVANCED:
            form[name] = schema_form.widget(KNOWN[name])
    return form, adapters, picker, new_seed, where, begin, compare, doctor


def _method_settings(form: Form) -> Compare:
    names = compose_regions.offered(compose_regions.EVERYWHERE)
    default = KNOWN["method"].default
    with gr.Column(elem_classes="as-plain") as one:
        form["method"] = gr.Radio(names, value=default, label="Method", elem_classes="as-choices", elem_id="method")
        summary = gr.HTML(_method_help(default), elem_classes="as-help", apply_default_css=False)
        form["tau"] = schema_form.widget(KNOWN["tau"], label="Steps per turn", visible=False, elem_id="tau")
    many = gr.CheckboxGroup(names, value=[name for _, name in names], label="Methods to compare", visible=False,
                            elem_id="compare-methods", info="One picture each, all from the same seed.")  # fmt: skip
    on = gr.Checkbox(False, label="Compare methods side by side", container=False, elem_id="compare")
    form["method"].change(
        lambda name: (_method_help(name), gr.update(visible=methods.known(str(name)).turns)),
        form["method"], [summary, form["tau"]], **PRIVATE,
    )  # fmt: skip
    on.input(lambda chosen: [gr.update(visible=chosen), gr.update(visible=not chosen)], on, [many, one],
             **PRIVATE)  # fmt: skip
    with gr.Accordion("Sweep", open=False, elem_classes="as-more as-inside"):
        sweep = gr.Textbox(
            "", label="Vary", lines=2, max_lines=6, placeholder="fox=0:1.2:7\nseed=1,2,3", elem_id="sweep",
            info="One picture for each combination, in a labelled grid. One setting per line: an adapter's weight "
            "(seven values from 0 to 1.2 above), seed, steps, guidance, method or checkpoint. Empty = no sweep.",
        )  # fmt: skip
        batch = schema_form.widget(SWEPT["batch"], label="Pictures at once", elem_id="sweep-batch")
    return Compare(on, many, one, sweep, batch)


def _wire_where(page: Page) -> None:
    """The methods on offer depend on where adapters act; the doctor may change both."""
    where, method, many = page.where, page.form["method"], page.compare.methods

    def chosen(mode: str, name: str) -> Any:
        return [*compose_regions.switch(mode), *_offer(mode, name)]

    @errors_shown
    def follow(
        rows: list[Row], report: Mapping[str, Any] | None, mode: str, name: str, drawn: list[Any], *shape: Any
    ) -> Any:
        changed, advised, regions = advice.followed(rows, report)
        size = None
        if regions and mode != compose_regions.AUTO:
            if not drawn:
                drawn = canvas.columns([row["name"] for row in changed])
                size = compose_regions.wide(len(drawn), *shape)
            mode = compose_regions.DRAWN
        elif not regions and advised:
            mode = compose_regions.EVERYWHERE
        told, shown, more = compose_regions.switch(mode)
        frame = {**shown, "value": drawn} | ({"frame": list(size)} if size else {})
        return [changed, mode, told, frame, more, *_offer(mode, advised or name), *(size or [gr.skip()] * 2)]

    where.mode.input(chosen, [where.mode, method], [*where.outputs[1:], method, many], **PRIVATE)
    where.canvas.edit_found(lambda name: [compose_regions.DRAWN, *chosen(compose_regions.DRAWN, name)], method,
                            [*where.outputs, method, many], **PRIVATE)  # fmt: skip
    shape = [*(page.form[name] for name in ("base", "width", "height")), page.start.picture]
    page.advice.follow.click(follow, [page.rack, page.advice.report, where.mode, method, where.canvas, *shape],
                             [page.rack, *where.outputs, method, many, *shape[1:3]], **PRIVATE)  # fmt: skip
    advice.wire(page.advice, page.rack, page.form["prompt"], where.canvas)
    compose_regions.wire(where, page.form, page.start.picture)
    start.wire(page.start)


def _offer(mode: str, name: str) -> list[Any]:
    """Updates of the method and of the methods to compare for a mode."""
    names = compose_regions.offered(mode)
    return [gr.update(choices=names, value=compose_regions.suitable(mode, name)),
            gr.update(choices=names, value=[name for _, name in names])]  # fmt: skip


def _method_title(name: str) -> str:
    return next((method.title for method in catalogue.stage("compose") if method.name == name), name)


def _method_help(name: str) -> str:
    found = next((method for method in catalogue.stage("compose") if method.name == name), None)
    return f"<p>{markup.text(found.summary)}</p>" if found else ""


def _picture_settings(form: Form) -> gr.Checkbox:
    form["base"] = gr.Dropdown(
        base_choices(), value=KNOWN["base"].default, label="Base model", allow_custom_value=True, interactive=True,
        info="From your library, or a hub id.", elem_id="base",
    )  # fmt: skip
    about = gr.HTML(about_base(str(KNOWN["base"].default)), elem_classes="as-help", apply_default_css=False)
    form["base"].change(about_base, form["base"], about, **PRIVATE)
    with gr.Row():
        for name in ("steps", "guidance_scale", "images"):
            form[name] = schema_form.widget(
                KNOWN[name], label=_LABELS[name], info=None, elem_id=name.replace("_", "-"), min_width=90
            )
    suited = [form[name] for name in OWN]
    for widget, update in zip(suited, own_settings(str(KNOWN["base"].default)), strict=True):
        widget.placeholder = update["placeholder"]
    with gr.Row():
        for name in ("width", "height"):
            form[name] = schema_form.widget(KNOWN[name], info=None, elem_id=name, min_width=90)
    with gr.Row(visible=False) as video:
        for name in ("frames", "fps"):
            form[name] = schema_form.widget(
                KNOWN[name], label=_LABELS[name], info="empty = the model's own", elem_id=name, min_width=90
            )
    with gr.Row(elem_classes="as-seed"):
        form["seed"] = gr.Number(label="Seed", precision=0, value=KNOWN["seed"].default, minimum=0, elem_id="seed",
                                 min_width=150)  # fmt: skip
        dice = gr.Button("Random", size="md", elem_id="random-seed", min_width=84, scale=0)
        again = gr.Checkbox(True, label="New seed each time", elem_id="new-seed", min_width=150, container=False)
    form["base"].input(lambda: ("", ""), None, suited, **PRIVATE)
    form["base"].change(lambda base: own_settings(str(base)), form["base"], suited, **PRIVATE)  # fmt: skip
    form["base"].change(lambda base: gr.update(visible=_moves(str(base))), form["base"], video,
                        **PRIVATE)  # fmt: skip
    dice.click(None, None, form["seed"], js=_RANDOM, **PRIVATE)
    return again


def _moves(base: str) -> bool:
    """Whether the base makes videos; of one outside the library that is not known, and it may."""
    known = {record.name: record.family for record in library.bases()}
    return base_families.moving(known[base]) if base in known else True


OWN = ("steps", "guidance_scale")
"""Fields that the base decides where they are empty."""


def own_settings(base: str) -> list[Any]:
    """Updates of the fields :data:`OWN` that show what ``base`` decides, if that is known before it is opened."""
    found = base_settings.usual(base) if base in {record.name for record in library.bases()} else ()
    return [gr.update(placeholder=f"{value:g}") for value in found] or [gr.update(placeholder="the base's own")] * 2


_LABELS = {"steps": "Steps", "guidance_scale": "Guidance (CFG)", "images": "Pictures", "frames": "Frames",
           "fps": "Frames per second"}  # fmt: skip
_RANDOM = "() => Math.floor(Math.random() * 2147483647)"


def adapter_choices() -> list[tuple[str, str]]:
    """Usable adapters as choices: shown with family and rank."""
    return [(label, record.name) for label, record in adapters_to_choose()]


def adapters_to_choose() -> list[tuple[str, library.Record]]:
    """The usable adapters, each with its text in menus."""
    usable = [
        record for record in library.adapters() if not record.problem and record.family not in base_families.WRITING
    ]
    return [(f"{record.name}   {rack.short_facts(record)}", record) for record in usable]


def base_choices() -> list[tuple[str, str]]:
    """Usable base models as choices."""
    usable = [record for record in library.bases() if not record.problem and record.family not in base_families.WRITING]
    return [
        (f"{record.name}   {base_families.written(record.family)}, {markup.file_size(record.size)}", record.name)
        for record in usable
    ]


def about_base(name: str) -> str:
    """What the base ``name`` works with, and its licence; empty for one that is not in the library."""
    record = next((record for record in library.bases() if record.name == name), None)
    if record is None or not (uses := base_families.works_with(record.family)):
        return ""
    own = record.notes.get("license")
    licence = own or f"{base_families.licence(record.family)} (family)"
    told = f"Works with {', '.join(uses)}. Licence: {licence}."
    return f"<p>{markup.text(told)}</p>"


# ------------------------------------------------------------------------------------------------ the rack


def _wire_rack(page: Page) -> None:
    @errors_shown
    def add(name: str | None, rows: list[Row]) -> Any:
        if not name:
            return gr.skip()
        return None, rack.add(rows, library.find(name))

    def insert(written: str, event: gr.EventData) -> str:
        return with_word(written, str(getattr(event, "word", "")))

    page.picker.input(add, [page.picker, page.rack], [page.picker, page.rack], **PRIVATE)  # fmt: skip
    follow_distilled = [page.form[name] for name in ("guidance_scale", "steps", "scheduler")]
    page.rack.change(suit, [page.rack, page.suited], [page.suited, *follow_distilled], **PRIVATE)  # fmt: skip
    prompt = page.form["prompt"]
    page.rack.insert_word(insert, prompt, prompt, **PRIVATE)


def suit(rows: list[Row], before: str) -> Any:
    """Settings that suit the distilled adapter in the rack; the usual ones when it has gone.

    Settings change only with the distilled adapter: what the user then chooses stays.
    """
    found = rack.suit(rows)
    now = repr(found) if found else ""
    if now == before:
        return [gr.skip()] * 4
    names = ("guidance_scale", "steps", "scheduler")
    chosen = found.settings() if found else {}
    fixed = found is not None and found.mode != "embedding"
    if fixed:  # what switches guidance off depends on the base
        chosen.pop("guidance_scale")
    values = {name: schema_form.show(KNOWN[name], chosen.get(name, KNOWN[name].default)) for name in names}
    info = None
    if found is not None:
        info = "built into the adapter" if fixed else f"{found.low:g} to {found.high:g} trained on"
    guidance = gr.update(value=values["guidance_scale"], interactive=not fixed, info=info)
    return [now, guidance, values["steps"], values["scheduler"]]


def with_word(prompt: str, word: str) -> str:
    """``prompt`` with a trigger word at its end, once."""
    prompt = (prompt or "").rstrip()
    if not word or word in prompt:
        return prompt
    joint = "" if not prompt else " " if prompt.endswith(",") else ", "
    return f"{prompt}{joint}{word}"


# ------------------------------------------------------------------------------------------------ making pictures


def config_of(
    values: Sequence[Any],
    rows: Sequence[Row] | None,
    where: Sequence[Any] = (compose_regions.EVERYWHERE, []),
    compare: Sequence[str] = (),
    sweep: Sequence[Any] = ("", 1),
    begin: Sequence[Any] = (None, start.USUAL),
) -> ComposeConfig:
    """The job of a filled form; raises :class:`InputError` for what cannot work.

    Args:
        values: of the fields, in the order of :data:`NAMES`.
        rows: the adapters.
        where: values of :attr:`Where.inputs`.
        compare: methods to compare side by side instead of using the form's.
        sweep: what to vary, one setting per line as in ``studio compose --sweep``; and pictures at once.
        begin: values of :attr:`Start.inputs`.
    """
    config = schema_form.read_all(KNOWN, NAMES, values)
    config["adapters"] = rack.uses(rows, library.adapters())
    compose_regions.check(where[0], rows)
    config |= compose_regions.read(*where) | start.read(*begin)
    if compare:
        config["method"] = compare[0]
        parsed: ComposeConfig = CompareConfig.parse({**config, "methods": compare}, source="the form")
    elif axes := [parse_axis(line) for line in sweep[0].splitlines() if line.strip()]:
        batch = schema_form.read(SWEPT["batch"], sweep[1])
        parsed = SweepConfig.parse({**config, "axes": axes, "batch": batch}, source="the sweep")
        deque(parsed.combinations(), 0)  # reports now what cannot be made
    else:
        parsed = ComposeConfig.parse(config, source="the form")
    if not parsed.prompt.strip():
        raise InputError("Write a prompt first: a few words about what to draw.")
    return parsed


@dataclass
class _Result:
    """The right side: progress, pictures, recipe."""

    job: gr.State
    shown: gr.State
    timer: gr.Timer
    panel: gr.HTML
    gallery: gr.Gallery
    recipe: gr.HTML
    chosen: gr.State
    actions: gr.Row
    reuse: gr.Button
    reuse_seed: gr.Button
    go_on: gr.Button
    download: gr.DownloadButton
    grid: gr.DownloadButton
    mix: gr.Accordion
    mix_name: gr.Textbox
    save_mix: gr.Button
    earlier: gr.HTML
    drop: gr.File

    @classmethod
    def draw(cls) -> _Result:
        job, shown, chosen = gr.State(""), gr.State(()), gr.State("")
        timer = gr.Timer(SECONDS, active=False)
        panel = gr.HTML(_EMPTY, elem_id="compose-panel", apply_default_css=False)
        gallery = gr.Gallery(
            label="Pictures", show_label=False, columns=2, height="auto", object_fit="contain",
            visible=False, interactive=False, elem_id="compose-gallery", buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Row(visible=False, elem_classes="as-actions-row") as actions:
            reuse = gr.Button("Reuse these settings", size="md", elem_id="reuse")
            reuse_seed = gr.Button("Reuse the seed", size="md")
            go_on = gr.Button("Use as start", size="md", elem_id="use-as-start")
            download = gr.DownloadButton("Download with recipe", size="md")
            grid = gr.DownloadButton("Download the grid", size="md", visible=False, elem_id="download-grid")
        recipe = gr.HTML("", elem_id="compose-recipe", apply_default_css=False)
        with gr.Accordion("Save this mix as one LoRA", open=False, visible=False, elem_classes="as-more",
                          elem_id="mix") as mix:  # fmt: skip
            mix_name = gr.Textbox(
                "my mix", label="Name in the library", max_lines=1, elem_id="mix-name",
                info="The adapters at these weights in one file, exactly: at weight 1 it draws the same.",
            )  # fmt: skip
            save = gr.Button("Save to the library", size="md", elem_id="save-mix")
        earlier = pick_list(elem_id="compose-earlier")
        with gr.Accordion("Settings from a picture file", open=False, elem_classes="as-more"):
            drop = gr.File(label="Drop a PNG made by Adapter Studio", file_types=[".png", ".json"], height=110,
                           elem_id="recipe-drop")  # fmt: skip
        return cls(job, shown, timer, panel, gallery, recipe, chosen, actions, reuse, reuse_seed, go_on,
                   download, grid,
                   mix, mix_name, save, earlier, drop)  # fmt: skip

    @property
    def followed(self) -> list[Any]:
        return [self.job, self.shown, self.timer, self.panel, self.gallery, self.chosen, self.grid, self.earlier]


_EMPTY = markup.empty(
    "Your pictures appear here",
    "Write a prompt, choose adapters from the library, and press Generate. Every picture keeps its recipe.",
)


def _wire_run(page: Page, result: _Result, generate: gr.Button, cancel: gr.Button) -> None:
    view = page.view

    @errors_shown
    def start(
        new_seed: bool, rows: list[Row], many: bool, compared: list[str], sweep: str, batch: Any, *values: Any
    ) -> Any:
        if many and sweep.strip():
            raise InputError("Compare methods or sweep, not both: 'method=merge,switch' in the sweep compares methods.")
        if many and not compared:
            raise InputError("Choose at least one method to compare, or make a picture with one method.")
        fields, begin, where = values[: len(NAMES)], values[len(NAMES) :][:2], values[len(NAMES) + 2 :]
        config = config_of(fields, rows, where, compared if many else (), (sweep, batch), begin)
        if new_seed:
            config.seed = secrets.randbelow(2**31)
        job_id = jobs.submit(config.kind, config)
        jobs.ensure_worker()
        return [config.seed, *follow(job_id, ())]

    def gone() -> list[Any]:
        hidden = gr.update(visible=False)
        return ["", (), gr.Timer(active=False), _EMPTY, hidden, "", hidden, earlier(), hidden]

    fields = [page.form[name] for name in NAMES]
    for begin in (generate.click, page.form["prompt"].submit):
        begin(start, [page.new_seed, page.rack, page.compare.on, page.compare.methods, page.compare.sweep,
                      page.compare.batch, *fields, *page.start.inputs, *page.where.inputs],
              [page.form["seed"], *view], **PRIVATE)  # fmt: skip
        begin(None, None, None, js=_TO_RESULT)
    job_panel.steer(job_panel.Area(result.job, result.timer, cancel, view, shown=result.shown), follow, gone)


_TO_RESULT = """() => { if (window.innerWidth < 760)
  document.getElementById('compose-result')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"""


def follow(job_id: str, shown: tuple[Any, ...]) -> Any:
    """The right side for a job; nothing changes while ``shown`` is up to date."""
    if not job_id:
        return gr.skip()
    job = jobs.get(job_id)
    pictures = made(job)
    now = (job.status, job.progress.step if job.progress else 0, job.progress.stage if job.progress else "",
           job.progress.preview if job.progress else "", len(pictures))  # fmt: skip
    if now == tuple(shown) and job.status != "running":
        return gr.skip()
    changed = not shown or now[-1] != shown[-1]
    first = not shown or not shown[-1]
    grid = (job.result or {}).get("grid")
    return [
        job_id, now, gr.Timer(active=job.active),
        job_panel.job_panel(job, ahead(job), preview(job)) + left_out(job) + said(job),
        gr.update(value=captioned(job, pictures), visible=bool(pictures), columns=1 if len(pictures) == 1 else 2)
        if changed else gr.skip(),
        (str(pictures[0]) if pictures else "") if changed and first else gr.skip(),
        gr.update(visible=bool(grid), value=grid or None),
        earlier() if changed else gr.skip(),
        gr.update(visible=job.active, value="Stop now" if job.status == "cancelling" else "Cancel"),
    ]  # fmt: skip


def earlier() -> str:
    """The latest pictures, to pick from."""
    found = gallery.pictures(limit=EARLIER)
    if not found:
        return ""
    head = '<h3>Made earlier <a href="gallery" data-page-link="gallery">all pictures</a></h3>'
    return f'<section class="as-earlier">{head}{picture_list.grid(found)}</section>'


ahead = job_panel.ahead


def left_out(job: Job) -> str:
    """The methods that a comparison could not use, with their reasons."""
    skipped = (job.result or {}).get("skipped") or {}
    told = "".join(f"<li>{markup.tag(_method_title(name))} {markup.text(why)}</li>" for name, why in skipped.items())
    return f'<section class="as-left-out"><h3>Left out</h3><ul>{told}</ul></section>' if told else ""


def said(job: Job) -> str:
    """A composition's remarks on its picture: what was scaled, cropped, or only partly used."""
    told = (job.result or {}).get("remarks") or []
    return "".join(markup.notice(remark, "info") for remark in told)


def preview(job: Job) -> str | None:
    """The latest preview of the current picture; none between pictures."""
    if not job.active:
        return None
    for report in reversed(jobs.history(job.id)):
        if report.stage == "saved":
            return None
        if report.preview:
            return report.preview
    return None


def made(job: Job) -> list[Path]:
    """The pictures a job has made so far, without those that were deleted."""
    named = [Path(path) for path in (job.result or {}).get("images", ())]
    return [path for path in named if path.is_file()] or gallery.files_of(job)


def captioned(job: Job, pictures: Sequence[Path]) -> list[Any]:
    """Pictures, or their videos, for a gallery; those of a comparison carry their method's name, those of a sweep their
    values."""
    labels = (job.result or {}).get("labels") or {}
    if job.kind == "sweep":
        return [(playable(path), labels.get(path.parent.name, "")) for path in pictures]
    if job.kind != "compare":
        return [playable(path) for path in pictures]
    return [(playable(path), _method_title(path.parent.name)) for path in pictures]


def playable(picture: Path) -> str:
    """The file that shows it: its video if it has one, else the picture."""
    return str(moving.video_of(picture) or picture)


# ------------------------------------------------------------------------------------------------ recipes


def _wire_recipes(page: Page, result: _Result) -> None:
    def choose(job_id: str, event: gr.SelectData) -> Any:
        pictures = made(jobs.get(job_id)) if job_id else []
        index = event.index if isinstance(event.index, int) else 0
        return str(pictures[index]) if index < len(pictures) else gr.skip()

    @errors_shown
    def describe(path: str, job_id: str) -> Any:
        if not path:
            return "", gr.update(visible=False), gr.skip(), gr.update(visible=False), compose_regions.result(None, "")
        behind = compose_regions.result(jobs.get(job_id) if job_id else None, path)
        recipe = recipe_png.read_recipe(path)
        mixed = recipe["config"].get("method") == save_mix.METHOD and len(recipe["config"].get("adapters") or ()) > 1
        file = gr.update(value=playable(Path(path)))
        layers = (jobs.get(job_id).result or {}).get("layers") if job_id else None
        return recipe_panel(recipe, layers), gr.update(visible=True), file, gr.update(visible=mixed), behind

    @errors_shown
    def reuse(path: str) -> Any:
        return fill(recipe_png.read_recipe(path))

    @errors_shown
    def reuse_seed(path: str) -> Any:
        return recipe_png.read_recipe(path)["config"].get("seed", 0)

    @errors_shown
    def go_on(path: str) -> Any:
        return begin_with(path)

    @errors_shown
    def save(path: str, name: str) -> Any:
        made = save_mix.save_apart(recipes.replay(recipe_png.read_recipe(path)), name, preview=Path(path))
        gr.Info(f"'{made.name}' is in the library now: one LoRA, for use at weight 1 ({made.accuracy}).", title="Saved")
        return gr.update(choices=adapter_choices())

    @errors_shown
    def dropped(path: str | None) -> Any:
        return fill(recipe_png.read_recipe(path)) if path else gr.skip()

    @errors_shown
    def again(event: gr.EventData) -> Any:
        picture = gallery.find(picked(event))
        shown = gr.update(value=[playable(picture.path)], visible=True, columns=1)
        return [picture.job, gr.Timer(active=False), "", shown, str(picture.path)]

    result.earlier.select(again, None, [result.job, result.timer, result.panel, result.gallery, result.chosen],
                          **PRIVATE)  # fmt: skip
    result.gallery.select(choose, result.job, result.chosen, **PRIVATE)
    described = [result.recipe, result.actions, result.download, result.mix, page.where.canvas]
    result.chosen.change(describe, [result.chosen, result.job], described, **PRIVATE)
    result.reuse.click(reuse, result.chosen, page.outputs, **PRIVATE)
    result.reuse_seed.click(reuse_seed, result.chosen, page.form["seed"], **PRIVATE)
    result.go_on.click(go_on, result.chosen, page.start.outputs[:2], **PRIVATE)
    result.go_on.click(None, None, None, js=_TO_START)
    result.save_mix.click(save, [result.chosen, result.mix_name], page.picker, **PRIVATE)
    result.drop.upload(dropped, result.drop, page.outputs, **PRIVATE)


_TO_START = """() => document.getElementById('start')?.scrollIntoView({behavior: 'smooth', block: 'center'})"""


def begin_with(path: str | Path) -> list[Any]:
    """Updates of the accordion and the picture that start from a picture of the studio."""
    return start.shown(start.of_picture(Path(path)))[:2]


def restore(kept: Any) -> Any:
    """Values of :attr:`Page.outputs` kept by the browser; adapters that no longer exist are left out."""
    values = remembered.values(kept, len(NAMES) + 2 + 4 + 2 + len(compose_regions.OPTIONS))
    if values is None:
        return gr.skip()
    begun, strength, rows, new_seed, comparing, compared, mode, drawn, *options = values[len(NAMES) :]
    begun = start.kept(begun)
    known = {record.name for record in library.adapters() if not record.problem}
    fields = dict(zip(NAMES, values, strict=False))
    told, where, more = compose_regions.switch(mode)
    method, many = _offer(mode, fields["method"])
    fields["method"] = method
    offered = [name for _, name in many["choices"]]
    chosen = {**many, "visible": comparing, "value": [name for name in compared or () if name in offered]}
    width, height = (schema_form.read(KNOWN[name], fields[name]) for name in ("width", "height"))
    frame = list(compose_regions.frame_of(str(fields["base"]), width, height, begun))
    rack_rows = [row for row in rows or () if row.get("name") in known]
    return [*fields.values(), *start.shown(begun, strength), rack_rows, new_seed, comparing, chosen,
            gr.update(visible=not comparing), mode, told, {**where, "value": drawn or [], "frame": frame}, more,
            *options]  # fmt: skip


def fill(recipe: Mapping[str, Any]) -> list[Any]:
    """Values of :attr:`Page.outputs` from a recipe; reports what no longer exists."""
    values, rows, missing = form_values(recipe)
    try:
        values[NAMES.index("base")] = recipes.replay(dict(recipe)).base
        gr.Info("The form has the picture's settings. The same adapters and base model are here.", title="Filled in")
    except InputError as error:
        say(str(error), title="Filled in, with a difference")
    if missing:
        say(f"Not in the library, left out: {', '.join(missing)}.", title="Adapters missing")
    config = ComposeConfig.parse(recipe["config"], source="the recipe").model_dump(mode="json")
    where = compose_regions.fill(config, compose_regions.names_here(recipe))
    values[NAMES.index("method")], many = _offer(where[0], config["method"])
    if config["controlnet"]:
        say("This page has no ControlNet: studio compose --from repeats the picture with it.", title="Left out")
    begun = start.shown(start.of_recipe(config), config["strength"])
    return [*values, *begun, rows, False, False, {**many, "visible": False}, gr.update(visible=True), *where]


def form_values(recipe: Mapping[str, Any]) -> tuple[list[Any], list[Row], list[str]]:
    """A recipe as (values in the order of :data:`NAMES`, rows of the rack, names of missing adapters).

    Raises:
        InputError: it is not a composition, or its settings are not valid.
    """
    if recipe.get("job") != "compose":
        raise InputError(f"This is the recipe of a '{recipe.get('job')}' job, not of a picture.")
    config = ComposeConfig.parse(recipe["config"], source="the recipe").model_dump(mode="json")
    hashes = {str(entry.get("name")): str(entry.get("sha256")) for entry in recipe.get("adapters") or ()}
    rows, missing = rack.rows_of(config, library.adapters(), hashes)
    return [schema_form.show(KNOWN[name], config[name]) for name in NAMES], rows, missing


def recipe_panel(recipe: Mapping[str, Any], layers: Mapping[str, str] | None = None) -> str:
    """The recipe of one picture, readable; ``layers`` says what an adapter changes, by its name."""
    config = recipe.get("config") or {}
    size = f"{config['width']} × {config['height']}" if config.get("width") and config.get("height") else ""
    used = "".join(_used(use, (layers or {}).get(str(use.get("name")), "")) for use in config.get("adapters") or ())
    pairs = [
        ("Method", _method_title(str(config.get("method")))), ("Base", config.get("base")),
        ("Seed", str(config.get("seed"))), ("Steps", config.get("steps")),
        ("Guidance", config.get("guidance_scale")), ("Size", size), ("Frames", config.get("frames")),
        ("Frames per second", config.get("fps")),
        ("Start picture", _begun(config)), ("ControlNet", config.get("controlnet")),
        ("Scheduler", config.get("scheduler") if config.get("scheduler") != "default" else ""),
        ("Avoided", config.get("negative_prompt")),
        ("Written as", (recipe.get("written") or {}).get("prompt")),
    ]  # fmt: skip
    body = f"<ul>{used}</ul>" if used else ""
    return (
        f'<section class="as-recipe" aria-label="Recipe"><h3>Recipe</h3><blockquote>{markup.text(config.get("prompt"))}'
        f"</blockquote>{body}{compose_regions.mini(config)}{markup.facts(pairs)}</section>"
    )


def _begun(config: Mapping[str, Any]) -> str:
    part = "its painted part " if config.get("mask") else ""
    return f"{part}redrawn at strength {config.get('strength')}" if config.get("image") else ""


def _used(use: Mapping[str, Any], layers: str) -> str:
    span = rack.active_span(use.get("schedule") or []) if use.get("schedule_by") != "sigma" else None
    when = "" if span == (0.0, 1.0) else f", {span[0]:.0%} to {span[1]:.0%} of the steps" if span else ", own schedule"
    told = f" <small>{markup.text(layers)}</small>" if layers else ""
    name = markup.tag(str(use.get("name") or use.get("path")))
    return f"<li>{name} <span>× {use.get('weight')}{when}</span>{told}</li>"
