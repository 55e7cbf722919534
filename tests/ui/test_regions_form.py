"""From drawn regions to a job and back, and what the doctor says as a page has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InputError
from studio.composition import canvas_size
from studio.composition.comparison_schema import CompareConfig
from studio.composition.region_schema import REGIONAL_METHODS, RegionFields
from studio.composition.schema import ComposeConfig
from studio.jobs import Job
from studio.library import Record
from ui.components import advice, canvas, rack
from ui.pages import compose, compose_regions

FOX = Record("fox", Path("/x/fox.safetensors"), "adapter", "sd", rank=8, triggers=("zxq fox",), sha256="f0")
CLAY = Record("clay", Path("/x/clay.safetensors"), "adapter", "sd", rank=4, sha256="c1")
MASK = "data:image/png;base64,iVBORw0KGgo="
REGIONS: list[dict[str, Any]] = [
    {"box": [0, 0, 0.5, 1], "adapters": ["fox"], "prompt": "a fox", "scale": 0.8, "schedule": [[0, 1], [1, 0]]},
    {"mask": MASK, "adapters": ["clay", "fox"], "negative": "dark", "words": ["lump"], "name": "right"},
]


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path))
    monkeypatch.setattr("studio.library.adapters", lambda: [FOX, CLAY])


def recipe(**values: Any) -> dict[str, Any]:
    adapters = [{"name": "fox", "path": "fox", "triggers": ["zxq fox"]}, {"name": "clay", "path": "clay"}]
    config = ComposeConfig.parse({"prompt": "two things", "adapters": adapters, **values})
    used = [{"name": use.name, "path": use.path, "sha256": ""} for use in config.adapters]
    return {"version": 1, "job": "compose", "config": config.model_dump(mode="json"), "adapters": used, "base": {}}


def refilled(made: dict[str, Any]) -> ComposeConfig:
    """The job of a form that was filled from a recipe."""
    values, rows, _ = compose.form_values(made)
    mode, _, shown, _, *options = compose_regions.fill(made["config"], compose_regions.names_here(made))
    return compose.config_of(values, rows, [mode, shown["value"], *options])


@pytest.mark.parametrize(
    "values",
    [
        {"regions": REGIONS},
        {"regions": REGIONS, "method": "lora-composer", "scope": "spatial", "self_mask": False, "refine": True,
         "trust_region": None, "refine_rate": 3.5, "capture": 2, "gaussian": False},
        {"regions": "auto", "method": "output", "auto_steps": 0.5},
        {"method": "switch"},
    ],
)  # fmt: skip
def test_regions_survive_the_way_to_the_page_and_back(values: dict[str, Any]) -> None:
    made = recipe(**values)
    assert refilled(made) == ComposeConfig.parse(made["config"])


def test_every_field_of_regions_is_on_the_page() -> None:
    assert {"regions", *compose_regions.OPTIONS} == set(RegionFields.model_fields)


def test_regions_follow_an_adapter_that_was_renamed() -> None:
    made = recipe(regions=REGIONS)
    made["adapters"][0]["sha256"] = "c1"
    made["config"]["adapters"] = made["config"]["adapters"][:1]
    made["config"]["regions"] = made["config"]["regions"][:1]
    assert [region.adapters for region in refilled(made).regions] == [["clay"]]  # type: ignore[union-attr]


def test_a_page_cannot_name_files_as_masks() -> None:
    with pytest.raises(InputError, match="was not painted here"):
        canvas.read([{"mask": "/etc/passwd", "adapters": ["fox"]}])
    shown = canvas.show([{"mask": "data:image/svg+xml;base64,AA", "adapters": ["fox"]}], {"fox": "fox"})
    assert shown[0]["mask"] == ""


@pytest.mark.parametrize(
    ("drawn", "sentence"),
    [
        ([], "Draw a region first"),
        ([{"box": [0, 0, 1, 1], "adapters": []}], "Region 1 has no adapter"),
        ([{"adapters": ["fox"]}], "Region 1 is empty"),
        ([{"box": [0.5, 0, 0.2, 1], "adapters": ["fox"]}], "x0 < x1"),
        ([{"box": [0, 0, 1, 1], "adapters": ["gone"]}], "'gone'"),
    ],
)
def test_unfinished_regions_are_sentences(drawn: list[Any], sentence: str) -> None:
    values, rows, _ = compose.form_values(recipe())
    values[compose.NAMES.index("method")] = "activation"
    defaults = compose_regions.fill({"base": "tinymoji"}, {})[4:]
    with pytest.raises(InputError, match=sentence):
        compose.config_of(values, rows, ["drawn", drawn, *defaults])


def test_regions_need_adapters() -> None:
    values, _, _ = compose.form_values(recipe())
    with pytest.raises(InputError, match="Regions need adapters"):
        compose.config_of(values, [], ["auto", []])


@pytest.mark.parametrize("mode", ["everywhere", "drawn", "auto"])
def test_methods_follow_the_mode(mode: str) -> None:
    names = {name for _, name in compose_regions.offered(mode)}
    assert (names <= set(REGIONAL_METHODS)) == (mode != "everywhere")
    for method in ("merge", "cross", "composite", "nothing"):
        assert compose_regions.suitable(mode, method) in names


def test_columns_cover_the_picture_once() -> None:
    drawn = canvas.columns(["a", "b", "c"])
    assert [region["adapters"] for region in drawn] == [["a"], ["b"], ["c"]]
    edges = [edge for region in drawn for edge in (region["box"][0], region["box"][2])]
    assert edges[0] == 0
    assert edges[-1] == 1
    assert edges[1:-1:2] == edges[2::2]


def test_methods_are_compared_with_the_same_everything() -> None:
    values, rows, _ = compose.form_values(recipe(seed=9, images=4))
    config = compose.config_of(values, rows, compare=["merge", "switch"])
    assert isinstance(config, CompareConfig)
    assert (config.kind, config.methods, config.seed) == ("compare", ["merge", "switch"], 9)


def test_the_frame_has_the_shape_of_the_picture() -> None:
    assert canvas_size.size("tinymoji") == (64, 64)
    assert canvas_size.size("tinymoji", 96) == (96, 64)
    assert canvas_size.size("nothing here", 512, 256) == (512, 256)


@pytest.mark.parametrize(
    ("side", "subjects", "size"),
    [(64, 1, (64, 64)), (64, 3, (128, 64)), (512, 2, (768, 512)), (768, 2, (1152, 768)), (1024, 2, (1216, 832)),
     (1024, 4, (1344, 768))],
)  # fmt: skip
def test_pictures_side_by_side_are_as_wide_as_the_base_draws_well(
    side: int, subjects: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas_size, "side", lambda base: side)
    assert canvas_size.wide("a base", subjects) == size


def test_a_size_that_was_chosen_stays() -> None:
    assert compose_regions.wide(2, "tinymoji", 96, None) is None
    assert compose_regions.wide(2, "tinymoji", "", "") == (128, 64)


def test_pictures_of_a_comparison_carry_their_method(tmp_path: Path) -> None:
    for name in ("merge", "composite"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture-3.png").write_bytes(b"")
    job = Job("1", "compare", "running", {}, 0.0, tmp_path)
    made = compose.made(job)
    assert {label for _, label in compose.captioned(job, made)} == {"Merge", "LoRA Composite"}


def test_a_comparison_says_what_it_left_out(tmp_path: Path) -> None:
    job = Job("1", "compare", "done", {}, 0.0, tmp_path, result={"skipped": {"switch": "not with <these>."}})
    told = compose.left_out(job)
    assert "LoRA Switch" in told
    assert "not with &lt;these&gt;." in told
    assert compose.left_out(Job("2", "compose", "running", {}, 0.0, tmp_path)) == ""


def test_block_factors_are_read_as_they_are_written() -> None:
    row = {**rack.new_row(FOX), "blocks": "down_blocks.1: 0.5\n\nmid_block:2", "te_weight": "0.3"}
    (use,) = rack.uses([row], [FOX])
    assert (use["blocks"], use["te_weight"]) == ({"down_blocks.1": 0.5, "mid_block": 2.0}, 0.3)
    for wrong in ("down_blocks.1", "down_blocks.1: much", ": 0.5"):
        with pytest.raises(InputError, match="one 'prefix: factor' per line"):
            rack.uses([{**row, "blocks": wrong}], [FOX])
    with pytest.raises(InputError, match="te_weight of 'fox' must be a number"):
        rack.uses([{**row, "te_weight": "much"}], [FOX])


def test_advice_changes_weights_method_and_regions() -> None:
    rows = [rack.new_row(FOX), rack.new_row(CLAY)]
    report = {"asked": [], "method": "activation", "weights": {"fox": 0.5, "clay": 1.0}, "regions": True, "reasons": []}
    changed, method, regions = advice.followed(rows, report)
    assert ([row["weight"] for row in changed], method, regions) == ([0.5, 1.0], "activation", True)
    assert advice.followed(rows, {**report, "method": "np-lora", "regions": False})[1:] == ("", False)
    assert advice.followed(rows, None) == (rows, "", False)


def test_what_the_doctor_says_cannot_become_markup() -> None:
    pair = {"first": "<b>", "second": "clay", "level": "high", "interference": 0.4, "common": 1.0}
    told = {"method": "merge", "weights": {"<i>": 1}, "regions": False, "reasons": ["<script>"]}
    html = advice.panel({"pairs": [pair], "advice": told, "remarks": ["<u>"]})
    assert "high conflict" in html
    assert not any(piece in html for piece in ("<script>", "<u>", "<i>", "<b></b>", "<span><b>"))


def test_a_recipe_shows_its_regions() -> None:
    html = compose.recipe_panel(recipe(regions=REGIONS))
    assert html.count("<rect") == 1
    assert "“a fox”" in html
    assert "painted" in html
    assert "found for it" in compose.recipe_panel(recipe(regions="auto"))
