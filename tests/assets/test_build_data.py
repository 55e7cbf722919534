"""Sprites, scenes and captions; drawn from small made-up art, no network needed."""

import itertools
import json

import numpy as np
import pytest

from assets.build import data

pytest.importorskip("cv2")

ICONS = {
    "prefix": "small",
    "width": 10,
    "height": 10,
    "icons": {
        "box": {"body": '<rect x="2" y="4" width="4" height="2" fill="#f00"/>'},
        "none": {"body": ""},
    },
    "aliases": {"crate": {"parent": "box"}},
}


@pytest.fixture
def sprites() -> np.ndarray:
    """All styles and subjects as opaque squares whose red channel is the subject's number."""
    made = np.zeros((len(data.STYLES), len(data.CONCEPTS), 8, 8, 4), np.uint8)
    made[..., 0] = np.arange(len(data.CONCEPTS))[None, :, None, None]
    made[..., 3] = 255
    return made


def test_rasterise_trims_and_centres() -> None:
    pytest.importorskip("resvg_py")
    sprite = data.rasterise(data.icon_svg(ICONS, "crate", 64), 32)
    assert sprite.shape == (32, 32, 4)
    assert sprite[16, 16].tolist() == [255, 0, 0, 255]
    rows = np.flatnonzero(sprite[..., 3].max(1) > 128)
    assert (sprite[16, 2:-2, 3] > 200).all()
    assert abs(rows.mean() - 15.5) < 0.6
    assert len(rows) == pytest.approx(16, abs=1)


def test_missing_and_empty_icons_are_errors() -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(KeyError, match="no icon 'ball'"):
        data.icon_svg(ICONS, "ball", 8)
    with pytest.raises(ValueError, match="empty"):
        data.rasterise(data.icon_svg(ICONS, "none", 16), 8)


def test_held_out_subjects_and_styles_never_enter_base_scenes() -> None:
    rng = np.random.default_rng(0)
    scenes = [data.sample_scene(rng, (1, 1, 1)) for _ in range(600)]
    used = {subject.concept for scene in scenes for subject in scene.subjects}
    assert used == set(data.BASE_CONCEPTS)
    assert {scene.style for scene in scenes} == set(data.BASE_STYLES)
    assert not set(data.HELD_CONCEPTS) & set(data.BASE_CONCEPTS)
    assert len(data.BASE_CONCEPTS) >= 100
    assert len(data.HELD_CONCEPTS) >= 12
    words = {word for scene in scenes for word in scene.caption.replace(",", " ").split()}
    assert not words & set(data.HELD_CONCEPTS)


def test_boxes_stay_inside_and_apart() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        boxes = [s.box() for s in data.sample_scene(rng, (1, 1, 1)).subjects]
        assert all(0 <= v <= 1 for box in boxes for v in box)
        assert all(a[2] <= b[0] + 1e-9 for a, b in itertools.pairwise(boxes))


def test_render_puts_subjects_at_their_boxes(sprites: np.ndarray) -> None:
    names = ("dog", "cat")
    scene = data.Scene("flat", (data.Placed("dog", 0.25, 0.5, 0.4), data.Placed("cat", 0.75, 0.5, 0.4)), "blue", "")
    image = data.render(scene, sprites)
    assert image.shape == (data.SIZE, data.SIZE, 3)
    numbers = [list(data.CONCEPTS).index(name) for name in names]
    assert [image[32, 16, 0], image[32, 48, 0]] == numbers
    assert tuple(image[0, 0]) == data.BACKGROUNDS["blue"]


def test_paste_cuts_what_is_outside() -> None:
    canvas = np.zeros((10, 10, 3), np.float32)
    data.paste(canvas, np.full((4, 4, 4), 255, np.uint8), 0.0, 0.0, 0.4)
    assert canvas[:2, :2].min() == 255
    assert canvas[2:, 2:].max() == 0
    data.paste(canvas, np.full((4, 4, 4), 255, np.uint8), 3.0, 3.0, 0.4)
    assert canvas[2:, 2:].max() == 0


@pytest.mark.parametrize(
    ("style", "names", "background", "form", "caption"),
    [
        ("flat", ["red apple"], None, 0, "a flat icon of a red apple"),
        (None, ["owl"], "blue", 0, "an icon of an owl, blue background"),
        ("bold", ["dog", "cat"], None, 1, "a bold icon of a cat right of a dog"),
        ("cartoon", ["grapes", "umbrella"], None, 4, "a cartoon icon of on the left grapes, on the right an umbrella"),
        ("flat", ["sun", "tree", "house"], None, 0, "a flat icon of a sun, a tree and a house"),
    ],
)
def test_captions(style: str | None, names: list[str], background: str | None, form: int, caption: str) -> None:
    assert data.make_caption(style, names, background, form) == caption


def test_four_subjects_are_refused() -> None:
    with pytest.raises(ValueError, match="one to three"):
        data.content_phrase(["dog"] * 4, 0)


def test_scenes_repeat_with_their_seed() -> None:
    first, second = ([data.sample_scene(np.random.default_rng(9), (1, 1, 1)) for _ in range(5)] for _ in range(2))
    assert first == second


def test_packages_already_there_need_no_npm(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name, version in data.PACKAGES.items():
        folder = tmp_path / "npm" / "node_modules" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"version": version}))
    monkeypatch.setattr(data.shutil, "which", lambda _name: None)
    assert data.fetch_packages(tmp_path) == tmp_path / "npm" / "node_modules"
    with pytest.raises(RuntimeError, match="npm is needed"):
        data.fetch_packages(tmp_path / "other")


def test_contact_sheet_keeps_every_picture() -> None:
    sheet = data.contact_sheet([np.full((3, 3, 3), v, np.uint8) for v in (10, 20, 30)], columns=2, gap=1)
    assert sheet.shape == (9, 9, 3)
    assert [sheet[1, 1, 0], sheet[1, 5, 0], sheet[5, 1, 0]] == [10, 20, 30]


def test_wide_scenes_have_room_for_each_subject() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        scene = data.sample_scene(rng, (1, 1, 1), aspect=2)
        boxes = [subject.box(scene.aspect) for subject in scene.subjects]
        assert all(min(left, top) >= 0 and max(right, bottom) <= 1 for left, top, right, bottom in boxes)
        assert all(a[2] <= b[0] for a, b in itertools.pairwise(boxes))


def test_a_wide_picture_shows_the_subject_inside_its_box() -> None:
    sprites = np.full((len(data.STYLES), len(data.CONCEPTS), 8, 8, 4), 255, np.uint8)
    name = next(iter(data.BASE_CONCEPTS))
    placed = data.Placed(name, 0.75, 0.5, 0.5)
    image = data.render(data.Scene("flat", (placed,), "black", "", 2), sprites, 32)
    assert image.shape == (32, 64, 3)
    rows, columns = np.nonzero(image.min(-1) > 200)
    left, top, right, bottom = placed.box(2)
    assert (columns.min(), columns.max() + 1) == (left * 64, right * 64)
    assert (rows.min(), rows.max() + 1) == (top * 32, bottom * 32)
