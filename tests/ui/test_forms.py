"""From recipes to forms and back, and the other pure parts of the pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adapters.errors import InputError
from studio import jobs
from studio.composition.region_schema import RegionFields
from studio.composition.schema import ComposeConfig
from studio.library import Record
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from ui import markup, pictures
from ui.components import faces, job_panel, loss_plot, rack, schema_form
from ui.pages import compose, distill, library, train
from ui.pages import jobs as jobs_page

FOX = Record("fox", Path("/x/fox.safetensors"), "adapter", "sd", rank=8, triggers=("zxq fox",), sha256="f0")
CLAY = Record("clay", Path("/x/clay.safetensors"), "adapter", "sd", rank=4, sha256="c1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[Record]:
    monkeypatch.setattr("studio.library.adapters", lambda: [FOX, CLAY])
    return [FOX, CLAY]


def recipe(**values: Any) -> dict[str, Any]:
    config = ComposeConfig.parse({"prompt": "a fox", **values})
    used = [{"name": use.name, "path": use.path, "sha256": ""} for use in config.adapters]
    return {"version": 1, "job": "compose", "config": config.model_dump(mode="json"), "adapters": used, "base": {}}


# ------------------------------------------------------------------------------------------------ compose


@pytest.mark.usefixtures("known")
def test_a_recipe_fills_the_form_and_the_form_makes_the_same_job() -> None:
    adapters = [
        {"name": "fox", "path": "fox", "weight": 0.6, "te_weight": 0.2, "triggers": ["zxq fox"],
         "schedule": [(0.0, 0.0), (0.2, 0.0), (0.2, 1.0), (1.0, 1.0)], "blocks": {"mid_block": 0.5}},
        {"name": "clay", "path": "clay", "schedule": [(0.0, 0.3), (1.0, 0.9)]},
    ]  # fmt: skip
    made = recipe(adapters=adapters, seed=7, steps=200, method="switch", tau=3, width=64, adapter_batch=2, images=1)
    values, rows, missing = compose.form_values(made)
    assert missing == []
    assert compose.config_of(values, rows) == ComposeConfig.parse(made["config"])


def test_every_field_of_a_composition_is_on_the_page() -> None:
    parts = {"adapters", *RegionFields.model_fields, "image", "mask", "strength"}
    without_page = {"controlnet", "control_image", "control_scale"}
    assert {*compose.NAMES, *parts, *without_page} == set(ComposeConfig.model_fields)


@pytest.mark.usefixtures("known")
def test_a_renamed_adapter_is_found_by_its_hash_and_a_lost_one_named() -> None:
    made = recipe(adapters=[{"name": "old", "path": "old"}, {"name": "lost", "path": "lost"}])
    made["adapters"][0]["sha256"] = "c1"
    _, rows, missing = compose.form_values(made)
    assert [row["name"] for row in rows] == ["clay"]
    assert missing == ["lost"]


@pytest.mark.usefixtures("known")
def test_what_a_page_sends_is_checked() -> None:
    with pytest.raises(InputError, match="no longer in the library"):
        rack.uses([{"name": "/etc/passwd"}], [FOX])
    with pytest.raises(InputError, match="weight of 'fox' must be a number"):
        rack.uses([{"name": "fox", "weight": "much"}], [FOX])
    with pytest.raises(InputError, match="already in the list"):
        rack.add([rack.new_row(FOX)], FOX)
    with pytest.raises(InputError, match="not of a picture"):
        compose.form_values({"job": "train-image", "config": {}})


@given(st.integers(0, 19), st.integers(1, 20))
def test_a_span_of_steps_survives_as_keyframes(start: int, length: int) -> None:
    first, last = start / 20, min(1.0, (start + length) / 20)
    keyframes = rack.keyframes(first, last)
    ComposeConfig.parse({"adapters": [{"path": "x", "schedule": keyframes}]})
    assert rack.active_span(keyframes) == (first, last)


@pytest.mark.parametrize("schedule", [[(0.0, 0.5)], [(0.0, 0.0), (1.0, 1.0)], [(0.0, 0.0)]])
def test_other_schedules_stay_as_they_are(schedule: list[tuple[float, float]]) -> None:
    assert rack.active_span(schedule) is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("", "zxq"), ("a dog", "a dog, zxq"), ("a dog, ", "a dog, zxq"), ("a zxq dog", "a zxq dog")],
)
def test_trigger_words_are_added_once(prompt: str, expected: str) -> None:
    assert compose.with_word(prompt, "zxq") == expected


# ------------------------------------------------------------------------------------------------ train


def test_every_field_of_a_training_is_on_the_page() -> None:
    shown = {"preset", "mode", "data", *train.MAIN}
    grouped = [name for names in schema_form.groups(train.KNOWN, shown).values() for name in names]
    assert sorted([*shown, *grouped]) == sorted(TrainImageConfig.model_fields)


@pytest.mark.parametrize(("mode", "length"), [(mode, length) for _, mode in train.KINDS for _, length in train.LENGTHS])
def test_presets_fill_the_form(mode: str, length: str) -> None:
    for base in ("tinymoji", "another"):
        values = schema_form.read_all(train.KNOWN, train.PRESET_FIELDS, train.preset_values(mode, length, base))
        given = {"data": "x", "trigger": "zxq", "base": base, "preset": f"{mode}-{length}"}
        assert TrainImageConfig.parse({**given, "mode": mode, **values}) == TrainImageConfig.parse(given)


def test_dropped_pictures_become_a_data_set(home: Path) -> None:
    place = home / "uploads" / "abc"
    place.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(place / "one.png")
    (place / "one.txt").write_text("a caption")
    (place / "empty.png").touch()
    (place / "text.jpg").write_text("no picture")
    (place / "song.mp3").write_text("no picture")
    Image.new("RGB", (9, 9)).save(home / "elsewhere.png")
    items, problems = pictures.receive([*sorted(place.iterdir()), home / "elsewhere.png"])
    assert [(item["name"], item["caption"], item["size"]) for item in items] == [("one.png", "a caption", "40 × 30")]
    assert len(problems) == 4
    again, _ = pictures.receive([place / "one.png"], items)
    assert len(again) == 1
    folder = pictures.keep([{**items[0], "caption": "mine"}], "My fox!")
    assert folder.parent == home / "datasets"
    assert [(file.name, file.suffix) for file in sorted(folder.iterdir())] == [
        ("001-one.png", ".png"), ("001-one.txt", ".txt")
    ]  # fmt: skip
    assert (folder / "001-one.txt").read_text() == "mine\n"


@pytest.mark.parametrize("item_id", ["../settings.yaml", "/etc/passwd", "", "missing.png", "../jobs/a.png"])
@pytest.mark.usefixtures("home")
def test_no_file_outside_the_uploads_becomes_training_data(item_id: str) -> None:
    with pytest.raises(InputError, match="is missing"):
        pictures.keep([{"id": item_id}], "x")
    with pytest.raises(InputError, match="no pictures yet"):
        pictures.keep([], "x")


def test_the_loss_is_drawn_with_its_average() -> None:
    points = [(step, 1.0 / step) for step in range(1, 1001)]
    drawn = loss_plot.loss_plot([*points, (1001, float("nan"))], validation=[(500, 0.1)], total=2000)
    assert "at step 1000" in drawn
    assert "validation" in drawn
    assert "nan" not in drawn
    assert len(drawn) < 40_000
    assert loss_plot.running_average([(1, 4.0), (2, 4.0)]) == [(1, 4.0), (2, pytest.approx(4.0))]
    assert loss_plot.loss_plot([]) == ""


# ------------------------------------------------------------------------------------------------ running jobs


@pytest.mark.parametrize(("kind", "page"), [("compose", compose), ("train-image", train)])
def test_what_is_shown_of_a_job_fits_the_page(kind: str, page: Any, home: Path) -> None:
    with gr.Blocks():
        view = page.build().view
    Image.new("RGB", (40, 30)).save(home / "one.png")
    values = {"prompt": "a fox"} if kind == "compose" else {"data": str(home), "trigger": "zxq"}
    job_id = jobs.submit(kind, values)
    shown = page.follow(job_id, ())
    assert len(shown) == len(view)
    assert "waiting for the worker" in shown[3]
    jobs.cancel(job_id)
    assert "cancelled" in page.follow(job_id, shown[1])[3]
    jobs.delete(job_id)
    with pytest.raises(InputError, match="There is no job"):
        page.follow(job_id, ())


# ------------------------------------------------------------------------------------------------ markup


def test_the_jobs_page_says_settings_in_words(home: Path) -> None:
    adapters = [{"name": "fox", "path": "fox", "weight": 0.7}, {"name": "clay", "path": "clay"}]
    regions = [{"box": [0, 0, 0.5, 1], "adapters": ["fox"], "prompt": "a fox"}]
    config = {"prompt": "a", "adapters": adapters, "regions": regions, "method": "activation", "fold": False}
    told = jobs_page.describe(jobs.get(jobs.submit("compose", config))).partition("<details>")[0]
    assert "fox, weight 0.7; clay<" in told
    assert "box 0, 0, 0.5, 1, adapters fox, prompt a fox<" in told
    assert "<td>no</td><td>yes</td>" in told
    assert "schedule" not in told
    assert not set("{}[]") & set(told)
    assert jobs_page._without_defaults(ComposeConfig, {"gone": 1}) == {"gone": 1}


def test_nothing_from_a_file_becomes_markup() -> None:
    nasty = "<img src=x onerror=alert(1)>\"'"
    record = Record(nasty, Path("/x") / "a", "adapter", triggers=(nasty,), notes={"description": nasty},
                    recipe={"a": nasty})  # fmt: skip
    made = recipe(prompt=nasty)
    for drawn in (library.card(record, True), library.describe(record), compose.recipe_panel(made),
                  markup.facts([(nasty, nasty)]), markup.notice(nasty), markup.empty(nasty, nasty)):  # fmt: skip
        assert "<img src=x" not in drawn
        assert "&lt;img" in drawn


def test_numbers_for_people() -> None:
    assert [markup.duration(seconds) for seconds in (8, 185, 7800)] == ["8 s", "3 min 5 s", "2 h 10 min"]
    assert [markup.file_size(size) for size in (0, 12, 13_000, 1_700_000)] == ["", "12\xa0B", "13\xa0kB", "1.7\xa0MB"]
    assert markup.ago(1000, now=1090) == "2 min ago"
    assert markup.file_url("/a b/c.png", 3) == "gradio_api/file=/a%20b/c.png?v=3"


# ------------------------------------------------------------------------------------------------ distillation


def marked(folder: Path, **entries: str) -> Record:
    """A file that says how it was distilled."""
    import numpy as np
    from safetensors.numpy import save_file

    path = folder / "swift.safetensors"
    save_file({"unet.x.to_q.lora_A.weight": np.zeros((2, 4), "float32")}, path, metadata=entries)
    return Record("swift", path, "adapter", "sd", rank=2)


def test_every_field_of_a_distillation_is_on_the_page() -> None:
    grouped = [name for names in schema_form.groups(distill.KNOWN, distill.MAIN).values() for name in names]
    assert sorted([*distill.MAIN, *grouped]) == sorted(DistillConfig.model_fields)


@pytest.mark.usefixtures("home")
def test_a_filled_distillation_form_is_a_job() -> None:
    values = {name: schema_form.show(item, item.default) for name, item in distill.KNOWN.items()}
    values |= {"prompts": "a dog\n\n a cat ", "styles": ["fox"], "guidance": 4, "objective": "consistency"}
    config = distill.config_of([values[name] for name in distill.NAMES])
    assert Path(config.prompts).read_text() == "a dog\na cat\n"
    assert (config.styles, config.guidance, config.objective) == (["fox"], 4.0, "consistency")
    with pytest.raises(InputError, match="no prompts yet"):
        distill.config_of([{**values, "prompts": " "}[name] for name in distill.NAMES])
    from_folder = distill.config_of([{**values, "prompts": "", "data": "x"}[name] for name in distill.NAMES])
    assert (from_folder.prompts, from_folder.data) == ("", "x")


def test_compose_suits_itself_to_a_distilled_adapter_once(tmp_path: Path) -> None:
    few = {"distilled_guidance": "4.0", "distilled_steps": "4", "distilled_sampler": "lcm"}
    row = rack.new_row(marked(tmp_path, **few))
    now, guidance, steps, sampler = compose.suit([row], "")
    assert (guidance["value"], guidance["interactive"], steps, sampler) == ("", False, "4", "lcm")
    assert compose.suit([row], now) == [gr.skip()] * 4
    _, guidance, steps, sampler = compose.suit([], now)
    assert (guidance["value"], guidance["interactive"], steps, sampler) == ("", True, "", "default")
    assert compose.suit([{**row, "weight": 0}], "") == [gr.skip()] * 4
    row = rack.new_row(marked(tmp_path, distilled_guidance="4", w_min="1", w_max="6.4", w_embedding="e.safetensors"))
    _, guidance, steps, _ = compose.suit([row], "")
    assert (guidance["value"], guidance["interactive"], guidance["info"]) == ("4", True, "1 to 6.4 trained on")
    assert steps == ""
    assert rack.new_row(marked(tmp_path))["distilled"] is None
    assert rack.new_row(marked(tmp_path, w_ref="four"))["distilled"] is None


def test_menus_show_faces_whatever_adapters_are_called(tmp_path: Path) -> None:
    face = tmp_path / 'a ")}.png'
    Image.new("RGB", (4, 4)).save(face)
    named = replace(FOX, preview=face)
    sheet = faces.sheet([('"]{} </style><b>·', named), ("no picture", replace(named, preview=None))])
    assert sheet.count("{") == sheet.count("[aria-label=") == 1
    assert '[aria-label="\\22 \\5d \\7b \\7d  \\3c \\2f style\\3e \\3c b\\3e \\b7 "]' in sheet
    assert "a%20%22%29%7D.png" in sheet
    assert faces.sheet([]) == ""


def test_cancel_stops_the_job_of_this_page_and_no_other(home: Path) -> None:
    own, other = (jobs.submit("compose", ComposeConfig(prompt=words)) for words in ("mine", "theirs"))
    assert job_panel.stopper(lambda job_id, shown: [job_id, shown])(own) == [own, ()]
    assert not jobs.get(own).active
    assert jobs.get(other).active


def test_a_page_lets_go_of_a_job_that_was_deleted(home: Path) -> None:
    own = jobs.submit("compose", ComposeConfig(prompt="mine"))
    look = job_panel.watcher(lambda job_id, shown: [jobs.get(job_id).status, shown], lambda: ["nothing"])
    assert look(own, ()) == ["queued", ()]
    jobs.cancel(own)
    jobs.delete(own)
    assert look(own, ()) == ["nothing"]
