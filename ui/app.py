"""The web app: its pages over the jobs and the library, served to this computer only unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from starlette.middleware import Middleware

from adapters.errors import InputError
from studio import jobs as job_store
from studio import library as shelves
from studio import settings
from studio.composition import gallery as kept
from studio.composition import recipe_png
from ui import access, markup, navigation, pictures, sessions
from ui.address import check_access, check_address, check_root_path, names, netloc
from ui.components import answers_run, faces, job_panel, rack, remembered
from ui.errors import errors_shown
from ui.events import PRIVATE
from ui.pages import ask, compose, federated, gallery, jobs, language, library, reconstruct, rna, speech, train
from ui.theme import STATIC, StudioTheme, css, script

A_DAY = 86400



@dataclass
class _Pages:
    tabs: gr.Tabs
    faces: gr.HTML
    compose: compose.Page
    gallery: gallery.Page
    train: train.Page
    language: language.Page
    ask: ask.Page
    rna: rna.Page
    speech: speech.Page
    federated: federated.Page
    reconstruct: reconstruct.Page
    library: library.Page
    jobs: jobs.Page


def build() -> gr.Blocks:
    """The whole app."""
    os.environ["GRADIO_TEMP_DIR"] = str(pictures.uploads())  # before components are made: they remember it
    app = gr.Blocks(title="Adapter Studio", analytics_enabled=False, fill_width=True, delete_cache=(A_DAY, A_DAY))
    with app:
        gr.HTML(markup.header(), elem_id="header", apply_default_css=False, js_on_load=script("header"))
        sheet = faces.draw(compose.adapters_to_choose())
        with gr.Row(elem_id="frame", equal_height=False):
            menu = navigation.menu()
            with gr.Tabs(selected=navigation.START, elem_id="pages") as tabs:
                with _tab("compose"):
                    compose_page = compose.build()
                with _tab("gallery"):
                    gallery_page = gallery.build()
                with _tab("train"):
                    train_page = train.build()
                with _tab("language"):
                    language_page = language.build()
                with _tab("ask"):
                    ask_page = ask.build()
                with _tab("rna"):
                    rna_page = rna.build()
                with _tab("speech"):
                    speech_page = speech.build()
                with _tab("federated"):
                    federated_page = federated.build()
                with _tab("reconstruct"):
                    reconstruct_page = reconstruct.build()
                with _tab("library"):
                    library_page = library.build()
                with _tab("jobs"):
                    jobs_page = jobs.build()
        pages = _Pages(
            tabs, sheet, compose_page, gallery_page, train_page, language_page, ask_page, rna_page, speech_page,
            federated_page,
            reconstruct_page, library_page, jobs_page,
        )  # fmt: skip
        _wire_tabs(app, menu, pages)
        _wire_crossings(pages)
    return app


def _tab(key: str) -> gr.Tab:
    return gr.Tab(navigation.TITLES[key], id=key, elem_id=f"page-{key}", render_children=True)


# ------------------------------------------------------------------------------------------------ between the pages


def _choosers(pages: _Pages) -> list[Any]:
    """Menus whose choices change with the library, in the order of :func:`_choices`."""
    distilling = pages.train.distill.form
    return [
        pages.compose.picker, pages.compose.form["base"], pages.train.form["base"], distilling["base"],
        distilling["styles"], pages.language.base, pages.language.adapters, pages.ask.base, pages.ask.adapters,
        pages.rna.base, pages.rna.adapter, pages.speech.base, pages.speech.adapters, pages.reconstruct.form["adapter"],
        pages.faces,
    ]  # fmt: skip


def _wire_tabs(app: gr.Blocks, menu: gr.HTML, pages: _Pages) -> None:
    """Refresh pages when the app opens and when the page changes."""
    choices = _choosers(pages)

    @errors_shown
    def arrive(path: str) -> Any:
        wanted = navigation.page_at(path)
        return [gr.Tabs(selected=wanted), gr.Timer(active=wanted == "jobs"), *_choices()]

    @errors_shown
    def go(event: gr.SelectData) -> Any:
        return [gr.Timer(active=event.value == navigation.TITLES["jobs"]), *_choices()]

    app.load(arrive, menu, [pages.tabs, pages.jobs.timer, *choices], js="() => [location.pathname]", **PRIVATE)
    for name, follow, view in (
        ("compose", compose.follow, pages.compose.view),
        ("train", train.follow, pages.train.view),
        ("distill", train.follow, pages.train.distill.view),
        ("language", answers_run.follow, pages.language.view),
        ("ask", answers_run.follow, pages.ask.view),
        ("federated", federated.follow, pages.federated.view),
        ("reconstruct", reconstruct.follow, pages.reconstruct.view),
        ("rna", rna.follow, pages.rna.view),
        ("speech", speech.follow, pages.speech.view),
    ):
        own = remembered.remember_job(name, view[0])
        app.load(partial(_own, follow), own, view, **PRIVATE)
    app.load(errors_shown(jobs.show), pages.jobs.refresh_inputs, pages.jobs.refresh_outputs, **PRIVATE)
    for name, page, outputs in (
        ("compose", compose, pages.compose.outputs),
        ("train", train, pages.train.kept),
    ):
        form = remembered.remember(name, getattr(pages, name).kept)
        app.load(errors_shown(page.restore), form, outputs, **PRIVATE)
    for arriving in (app.load, pages.tabs.select):
        arriving(errors_shown(gallery.show), pages.gallery.refresh_inputs, pages.gallery.refresh_outputs, **PRIVATE)
    listed = [
        arriving(errors_shown(library.show), pages.library.refresh_inputs, pages.library.refresh_outputs, **PRIVATE)
        for arriving in (app.load, pages.tabs.select)
    ]
    gr.on(pages.library.acts, None, cancels=listed, **PRIVATE)  # an earlier answer must not overwrite a change
    pages.tabs.select(go, None, [pages.jobs.timer, *choices], **PRIVATE)
    pages.tabs.select(errors_shown(jobs.show), pages.jobs.refresh_inputs, pages.jobs.refresh_outputs, **PRIVATE)


def _choices() -> list[Any]:
    adapters, bases = gr.update(choices=compose.adapter_choices()), gr.update(choices=compose.base_choices())
    models, talkers = gr.update(choices=language.base_choices()), gr.update(choices=language.adapter_choices())
    sights, seers = gr.update(choices=ask.base_choices()), gr.update(choices=ask.adapter_choices())
    scenes, sheet = gr.update(choices=reconstruct.adapter_choices()), faces.sheet(compose.adapters_to_choose())
    cells, tellers = gr.update(choices=rna.base_choices()), gr.update(choices=rna.adapter_choices())
    ears, voices = gr.update(choices=speech.base_choices()), gr.update(choices=speech.adapter_choices())
    return [adapters, bases, bases, bases, adapters, models, talkers, sights, seers, cells, tellers, ears,
            voices, scenes, sheet]


def _own(follow: Callable[[str, tuple[Any, ...]], Any], job_id: Any) -> Any:
    """The job that this browser looked at last, not anybody else's."""
    try:
        return follow(str(job_id or ""), ())
    except InputError:  # deleted meanwhile
        return gr.skip()


def _wire_crossings(pages: _Pages) -> None:
    """Buttons that take an adapter, a picture or a job to the page that uses it."""
    target = pages.compose

    @errors_shown
    def use(chosen: str, shelf: str, rows: list[rack.Row]) -> Any:
        record = shelves.find(chosen, "base" if shelf == "base" else "adapter")
        if record.family == "language":
            return [gr.Tabs(selected="language"), gr.skip(), gr.skip(), *language.use(record), *[gr.skip()] * 7]
        if record.family == ask.FAMILY:
            return [gr.Tabs(selected="ask"), *[gr.skip()] * 5, *ask.use(record), *[gr.skip()] * 4]
        if record.family == rna.FAMILY:
            return [gr.Tabs(selected="rna"), *[gr.skip()] * 8, *rna.use(record), *[gr.skip()] * 2]
        if record.family == speech.FAMILY:
            return [gr.Tabs(selected="speech"), *[gr.skip()] * 10, *speech.use(record)]
        skipped = [gr.skip()] * 10
        if shelf == "base":
            return [gr.Tabs(selected="compose"), gr.skip(), chosen, *skipped]
        return [gr.Tabs(selected="compose"), rack.add(rows, record), gr.skip(), *skipped]

    @errors_shown
    def try_it(job_id: str, step: Any, rows: list[rack.Row], prompt: str) -> Any:
        job = job_store.get(job_id)
        record = shelves.find(train.add_to_library(job, step))
        present = any(row["name"] == record.name for row in rows or ())
        words = job.config.get("trigger") or next(iter(record.triggers), "")
        return [gr.Tabs(selected="compose"), rows if present else rack.add(rows, record),
                compose.with_word(prompt, words), job.config.get("base") or gr.skip()]  # fmt: skip

    @errors_shown
    def open_job(job_id: str) -> Any:
        job = job_store.get(job_id)
        views = {"compose": target.view, "train-image": pages.train.view, "distill": pages.train.distill.view,
                 "train-language": pages.language.jobs_view, "train-vision-language": pages.ask.jobs_view,
                 "federate": pages.federated.view, "reconstruct": pages.reconstruct.view,
                 "classify-rna": pages.rna.view, "transcribe": pages.speech.view,
                 "forgetting": pages.library.looking}  # fmt: skip
        shown = {kind: [gr.skip()] * len(view) for kind, view in views.items()}
        kind = job_panel.VIEWS[job.kind]
        follow = {
            "compose": compose.follow,
            "train-language": language.open_job,
            "train-vision-language": ask.open_job,
            "federate": federated.follow,
            "reconstruct": reconstruct.follow,
            "classify-rna": rna.follow,
            "transcribe": speech.follow,
            "forgetting": library.open_job,
        }.get(kind, train.follow)
        shown[kind] = list(follow(job.id, ()))
        way = {"train-image": "pictures", "distill": "distill"}.get(job.kind)
        switched = train.show_way(way) if way else [gr.skip()] * len(pages.train.switch)
        own_tab = {"compose": "compose", "train-language": "language", "train-vision-language": "ask",
                   "federate": "federated", "reconstruct": kind, "classify-rna": "rna", "transcribe": "speech",
                   "forgetting": "library"}  # fmt: skip
        tab = gr.Tabs(selected=own_tab.get(kind, "train"))
        return [tab, gr.Timer(active=False), *switched, *(part for view in shown.values() for part in view)]

    @errors_shown
    def reuse(key: str) -> Any:
        return [gr.Tabs(selected="compose"), *compose.fill(recipe_png.read_recipe(kept.find(key).path))]

    @errors_shown
    def go_on(key: str) -> Any:
        return [gr.Tabs(selected="compose"), *compose.begin_with(kept.find(key).path)]

    pages.gallery.go_on.click(go_on, pages.gallery.chosen, [pages.tabs, *target.start.outputs[:2]], **PRIVATE)
    pages.gallery.reuse.click(reuse, pages.gallery.chosen, [pages.tabs, *target.outputs], **PRIVATE)
    base, prompt = target.form["base"], target.form["prompt"]
    used = pages.library.use.click(
        use, [pages.library.chosen, pages.library.shelf, target.rack],
        [pages.tabs, target.rack, base, pages.language.mode, pages.language.base, pages.language.adapters,
         pages.ask.mode, pages.ask.base, pages.ask.adapters, pages.rna.base, pages.rna.adapter,
         pages.speech.base, pages.speech.adapters], **PRIVATE,
    )  # fmt: skip
    tried = [
        page.try_it.click(try_it, [page.job, page.step, target.rack, prompt],
                          [pages.tabs, target.rack, prompt, base], **PRIVATE)
        for page in (pages.train, pages.train.distill)
    ]  # fmt: skip
    opened = pages.jobs.open.click(
        open_job, pages.jobs.chosen,
        [pages.tabs, pages.jobs.timer, *pages.train.switch, *target.view, *pages.train.view, *pages.train.distill.view,
         *pages.language.jobs_view, *pages.ask.jobs_view, *pages.federated.view, *pages.reconstruct.view,
         *pages.rna.view, *pages.speech.view, *pages.library.looking],
        **PRIVATE,
    )  # fmt: skip
    for arrival in (used, *tried, opened):  # a page that was not opened by its tab
        arrival.then(errors_shown(_choices), None, _choosers(pages), **PRIVATE)


# ------------------------------------------------------------------------------------------------ serving


def launch(
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    share: bool = False,
    max_upload: str = "200mb",
    open_browser: bool = False,
    allow_hosts: Sequence[str] = (),
    root_path: str = "",
) -> None:
    """Serve the app until it is stopped.

    Args:
        host: address to listen on; the default lets only this computer in, ``0.0.0.0`` the whole network.
        password: asked for when the page opens (the name does not matter); none = no question.
        share: also open a public link through Gradio's server; needs a password.
        max_upload: largest file that may be dropped ("200mb").
        open_browser: open the page.
        allow_hosts: more names that the app answers to (a proxy's, or ``*.example.org``).
        root_path: path under which a proxy serves the app ("/studio"), or its whole address there.

    Raises:
        InputError: the port is taken, the address is not this computer's, or the app would be open to strangers.
    """
    sessions.bound_memory()
    check_access(host, password, share)
    check_address(host, port)
    root_path = check_root_path(root_path)
    attempts = access.Attempts() if password else None
    known = names(host, allow_hosts, root_path, share)
    guard = Middleware(access.Access, names=known, attempts=attempts, root_path=root_path)
    app = build()
    app.queue(default_concurrency_limit=8)
    app.launch(
        server_name=netloc(host, port).rpartition(":")[0], server_port=port, share=share, inbrowser=open_browser,
        max_file_size=max_upload, auth=access.asks_for(password) if password else None,
        auth_message="Any name, and the password of this studio.", root_path=root_path or None,
        allowed_paths=served(), blocked_paths=hidden(), theme=StudioTheme(), css=css(), head=_HEAD, footer_links=[],
        favicon_path=STATIC / "icon.png", ssr_mode=False, run_history=False, pwa=False, mcp_server=False,
        show_error=False, quiet=True, enable_monitoring=False, strict_cors=True,
        state_session_capacity=sessions.OPEN,
        app_kwargs={"middleware": [guard, Middleware(sessions.Sessions), Middleware(navigation.Addresses)]},
    )  # fmt: skip


_HEAD = '<meta name="color-scheme" content="light dark">'


def served() -> list[str]:
    """The only folders whose files the app serves: jobs, the library, shipped adapters, models and scenes."""
    places = [settings.folder("jobs"), *settings.adapter_folders(), *shipped()]
    return [str(place.resolve()) for place in places]


def shipped() -> list[Path]:
    """Folders that ship with the studio."""
    import assets

    root = Path(assets.__file__).parent
    return [root / "adapters", root / "models", root / "scenes"]


def hidden() -> list[str]:
    """Files that are never served."""
    return [str(settings.settings_file())]
