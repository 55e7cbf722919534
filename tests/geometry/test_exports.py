"""Exports and what is chosen for them, read back by other programs' rules."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from adapters.errors import InputError
from pipelines.geometry import alignment, selection
from pipelines.geometry.exports import gltf
from pipelines.geometry.exports.colmap import write_colmap
from pipelines.geometry.exports.glb import write_glb
from pipelines.geometry.exports.nerfstudio import write_nerfstudio
from pipelines.geometry.exports.pictures import word
from pipelines.geometry.exports.ply import write_ply
from pipelines.geometry.images import Affine, Photo, read_photo
from pipelines.geometry.scene import TO_GL, Array, Scene
from pipelines.geometry.selection import Selection
from tests.geometry.rooms import room

EVERYTHING = Selection(percentile=0)
LINEAR_GREY = ((128 / 255 + 0.055) / 1.055) ** 2.4


@pytest.fixture
def kept() -> Scene:
    made = room(5, views=3, size=16)
    scene = alignment.align(made.predictions, 5)
    photos = [Photo(x, Affine((0.5, 0.5), (0, 0), (32, 32)), f"{n}.png") for n, x in enumerate(made.views.image[0])]
    return Scene.of(scene, photos)


@pytest.fixture
def originals(tmp_path: Path) -> list[Path]:
    """Files of the kept scene: twice its size."""
    files = [tmp_path / "photos" / f"{n}.png" for n in range(3)]
    files[0].parent.mkdir()
    for n, file in enumerate(files):
        Image.new("RGB", (32, 32), (40 * n, 90, 90)).save(file)
    return files


# ------------------------------------------------------------------------------------------------ one file


def test_points_come_back_in_the_axes_of_each_format(kept: Scene, tmp_path: Path) -> None:
    again = Scene.load(kept.save(tmp_path / "scene.npz"))
    points, colours, _ = selection.cloud(again, EVERYTHING)
    np.testing.assert_allclose(points[:256], kept.points(0).reshape(-1, 3))

    assert write_ply(kept, tmp_path / "a.ply", EVERYTHING).points == 768
    ply = trimesh.load(tmp_path / "a.ply")
    np.testing.assert_allclose(ply.vertices, points, atol=1e-4)  # the scene's own world
    np.testing.assert_array_equal(ply.colors[:, :3], colours)  # sRGB bytes as they are

    assert write_glb(kept, tmp_path / "a.glb", EVERYTHING, mesh=False, cameras=False).points == 768
    loaded = trimesh.load(tmp_path / "a.glb")
    place, name = loaded.graph[loaded.graph.nodes_geometry[0]]
    glb = trimesh.transform_points(loaded.geometry[name].vertices, place)
    own = (points - kept.poses[0][:3, 3]) @ kept.poses[0][:3, :3]  # the first camera's frame, OpenCV
    np.testing.assert_allclose(glb, own * [1, -1, -1], atol=1e-4)  # y up, z backward


def test_surfaces_and_cameras_with_their_photos(kept: Scene, tmp_path: Path) -> None:
    points = write_glb(kept, tmp_path / "m.glb", EVERYTHING, mesh=True).points
    loaded = trimesh.load(tmp_path / "m.glb")
    assert len(loaded.geometry["surface"].vertices) == points
    front = loaded.geometry["surface"].face_normals @ (0, 0, 1)
    assert float(np.median(front)) > 0  # seen from the first camera, faces turn their front to it
    for n, name in enumerate(kept.names):
        photo = loaded.geometry[name]
        assert photo.visual.material.baseColorTexture.size == (16, 16)
        centre = (TO_GL @ np.linalg.inv(kept.poses[0]) @ kept.poses[n])[:3, 3]
        assert float(np.linalg.norm(loaded.geometry[f"camera {n}"].vertices - centre, axis=1).min()) < 0.1
        upper_left = photo.vertices[np.argmin(np.abs(photo.visual.uv - [0, 1]).sum(1))]  # trimesh counts v from below
        lower_left = photo.vertices[np.argmin(np.abs(photo.visual.uv - [0, 0]).sum(1))]
        if n == 0:
            assert upper_left[1] > lower_left[1]


@pytest.mark.parametrize("mesh", [False, True])
def test_colours_in_a_glb_are_linear_and_the_file_is_sound(kept: Scene, tmp_path: Path, mesh: bool) -> None:
    grey = replace(kept, images=tuple(np.full((16, 16, 3), 128, np.uint8) for _ in range(3)))
    write_glb(grey, tmp_path / "a.glb", EVERYTHING, mesh=mesh)
    tree, accessors = read_glb(tmp_path / "a.glb")
    primitive = tree["meshes"][0]["primitives"][0]
    assert primitive["mode"] == (4 if mesh else 0)
    np.testing.assert_allclose(accessors[primitive["attributes"]["COLOR_0"]][:, :3], LINEAR_GREY, atol=1e-4)
    if mesh:
        assert accessors[primitive["indices"]].max() == len(accessors[primitive["attributes"]["POSITION"]]) - 1


def read_glb(file: Path) -> tuple[dict[str, Any], list[Array]]:
    """The JSON and the values of all accessors, by the letter of the standard."""
    data = file.read_bytes()
    magic, version, length, size, kind = struct.unpack("<IIIII", data[:20])
    assert (magic, version, length, kind) == (0x46546C67, 2, len(data), 0x4E4F534A)
    tree = json.loads(data[20 : 20 + size])
    count, kind = struct.unpack("<II", data[20 + size : 28 + size])
    blob = data[28 + size :]
    assert (len(blob), kind) == (count, 0x004E4942)
    assert tree["buffers"] == [{"byteLength": count}]
    out = []
    for entry in tree["accessors"]:
        view = tree["bufferViews"][entry["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[entry["type"]]
        dtype, most = {5126: ("<f4", 1), 5123: ("<u2", 65535), 5125: ("<u4", 1)}[entry["componentType"]]
        values = np.frombuffer(blob, dtype, entry["count"] * width, view["byteOffset"]).reshape(-1, width)
        if "min" in entry:
            np.testing.assert_array_equal(values.min(0), np.array(entry["min"], "<f4"))
            np.testing.assert_array_equal(values.max(0), np.array(entry["max"], "<f4"))
        out.append(values / most if entry.get("normalized") else values)
    return tree, out


def test_srgb_bytes_survive_as_linear_numbers() -> None:
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    value = gltf.linear(every)[:, 0] / 65535
    back = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055) * 255
    np.testing.assert_array_equal(np.rint(back), np.arange(256))


# ------------------------------------------------------------------------------------------------ files of cameras


def colmap(folder: Path) -> list[tuple[str, list[float], tuple[int, int], Array]]:
    """Name, (fx, fy, cx, cy), size and world-to-camera ``(4, 4)`` of every image, split as the format is read."""
    cameras = {row[0]: row for row in map(str.split, _lines(folder / "cameras.txt"))}
    out = []
    for row in map(str.split, _lines(folder / "images.txt")):
        assert len(row) == 10, "a name with white space"
        w, x, y, z, *shift = map(float, row[1:8])
        view = np.eye(4)
        view[:3, :3], view[:3, 3] = Rotation.from_quat([x, y, z, w]).as_matrix(), shift
        kind, width, height, *numbers = cameras[row[8]][1:]
        assert kind == "PINHOLE"
        out.append((row[9], [float(v) for v in numbers], (int(width), int(height)), view))
    return out


def nerfstudio(folder: Path) -> list[tuple[str, list[float], tuple[int, int], Array]]:
    """The same of ``transforms.json``; OpenGL's cameras as OpenCV's."""
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    return [
        (Path(f["file_path"]).name, [f["fl_x"], f["fl_y"], f["cx"], f["cy"]], (f["w"], f["h"]),
         np.linalg.inv(np.array(f["transform_matrix"]) @ np.diag([1, -1, -1, 1])))
        for f in frames
    ]  # fmt: skip


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


READERS = [pytest.param(write_colmap, colmap, id="colmap"), pytest.param(write_nerfstudio, nerfstudio, id="nerfstudio")]


@pytest.mark.parametrize(("write", "read"), READERS)
@pytest.mark.parametrize("known", [True, False])
def test_cameras_see_the_points_at_the_pixels_of_the_pictures_beside_them(
    write: Any, read: Any, known: bool, kept: Scene, originals: list[Path], tmp_path: Path
) -> None:
    made = write(kept, tmp_path / "out", EVERYTHING, originals if known else ())
    assert made.points == 768
    assert bool(made.notes) is not known
    scale = 2 if known else 1  # the files are twice as large as what the network saw
    v, u = np.mgrid[:16, :16]
    for n, (name, (fx, fy, cx, cy), size, view) in enumerate(read(tmp_path / "out")):
        with Image.open(tmp_path / "out/images" / name) as picture:
            assert picture.size == size == (16 * scale, 16 * scale)
        own = kept.points(n).reshape(-1, 3) @ view[:3, :3].T + view[:3, 3]
        place = own[:, :2] / own[:, 2:] * [fx, fy] + [cx, cy]
        centres = (np.stack([u.ravel(), v.ravel()], -1) + 0.5) * scale  # pixel centres at halves
        np.testing.assert_allclose(place, centres, atol=1e-3)
        if known:
            assert (tmp_path / "out/images" / name).read_bytes() == originals[n].read_bytes()


@pytest.mark.parametrize(("write", "read"), READERS)
def test_names_stay_one_word_and_stay_apart(write: Any, read: Any, kept: Scene, tmp_path: Path) -> None:
    scene = replace(kept, names=("beach (1) morning.jpg", "beach (1)\tmorning.jpg", "a/b\n.png"))
    made = write(scene, tmp_path / "out", EVERYTHING)
    names = [row[0] for row in read(tmp_path / "out")]
    assert names == ["beach_(1)_morning.png", "beach_(1)_morning-2.png", "b_.png"]
    assert sorted(file.name for file in (tmp_path / "out/images").iterdir()) == sorted(names)
    assert any("'beach (1) morning.jpg' as beach_(1)_morning.png" in text for text in made.notes)


def test_words() -> None:
    assert word("plain-name_1.v2") == "plain-name_1.v2"
    assert word("a\u3000b\x1b\udcff") == "a_b__"
    assert word("") == "_"


@pytest.mark.parametrize(("write", "read"), READERS)
def test_photos_turned_by_exif_are_brought_upright(write: Any, read: Any, tmp_path: Path) -> None:
    photos, ends = [], []
    for n, turn in enumerate((1, 3, 6, 8, 2)):
        exif = Image.Exif()
        exif[0x112] = turn
        stored = np.zeros((48, 96, 3), np.uint8)
        stored[:, :48, 0] = 255  # the stored picture's left half is red
        file = tmp_path / f"{n}.{'jpg' if turn == 6 else 'png'}"
        Image.fromarray(stored).save(file, exif=exif)
        photos.append(read_photo(file, 32, 8, True))
        ends.append({1: "left", 3: "right", 6: "top", 8: "bottom", 2: "right"}[turn])
    scene = Scene(
        tuple(p.name for p in photos), tuple(p.affine for p in photos), np.tile(np.eye(4), (5, 1, 1)), np.full(5, 30.0),
        tuple((p.pixels.permute(1, 2, 0) * 255).byte().numpy() for p in photos), tuple(np.ones(p.size) for p in photos),
        tuple(np.full(p.size, 5.0) for p in photos), files=tuple(p.file for p in photos),
    )  # fmt: skip
    made = scene.export(tmp_path / "out", write.__name__.removeprefix("write_"))
    assert any("upright 8-bit copies" in text for text in made.notes)
    for (name, (fx, _, cx, cy), size, _), photo, end in zip(read(tmp_path / "out"), photos, ends, strict=True):
        pixels = np.array(Image.open(tmp_path / "out/images" / name)).astype(int)  # as stored: nothing is turned
        assert size == pixels.shape[1::-1] == ((48, 96) if end in ("top", "bottom") else (96, 48))
        assert (cx, cy) == pytest.approx((size[0] / 2, size[1] / 2), abs=1.6)
        assert fx == pytest.approx(30 / photo.affine.scale[0])
        part = {"left": pixels[:, :40], "right": pixels[:, -40:], "top": pixels[:40], "bottom": pixels[-40:]}[end]
        assert part[..., 0].min() > 200


def test_what_other_programs_cannot_read_becomes_png_and_what_changed_is_said(
    kept: Scene, originals: list[Path], tmp_path: Path
) -> None:
    Image.fromarray(np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)).save(originals[0])
    Image.new("RGB", (32, 32), "red").save(originals[1].with_suffix(".webp"))
    originals[1] = originals[1].with_suffix(".webp")
    Image.new("RGB", (20, 20)).save(originals[2])
    made = write_colmap(kept, tmp_path / "out", EVERYTHING, originals)
    grey, red, own = (Image.open(tmp_path / "out/images" / name) for name in ("0.png", "1.png", "2.png"))
    assert (grey.mode, np.array(grey)[16, 0, 0]) == ("RGB", 128)
    assert red.format == "PNG"
    assert own.size == (16, 16)
    assert any("2.png are missing or have changed" in text for text in made.notes)
    assert colmap(tmp_path / "out")[2][2] == (16, 16)


def test_files_of_cameras_need_two_pictures(kept: Scene, tmp_path: Path) -> None:
    one = Scene(("a.png",), *(getattr(kept, f)[:1] for f in (
        "affines", "poses", "focals", "images", "depth", "confidence")))  # fmt: skip
    for write in (write_colmap, write_nerfstudio):
        with pytest.raises(InputError, match="two pictures or more"):
            write(one, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ what is chosen


def test_squares_cover_their_pixels_and_grow_when_there_are_fewer(kept: Scene) -> None:
    vertices, colours, faces = selection.squares(kept, EVERYTHING)
    assert (len(vertices), len(faces)) == (4 * 768, 2 * 768)
    own = (vertices[:1024] - kept.poses[0][:3, 3]) @ kept.poses[0][:3, :3]
    place = own[:, :2] / own[:, 2:] * kept.focals[0] + 8
    np.testing.assert_allclose(place[:4], [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], atol=1e-5)
    np.testing.assert_array_equal(colours[::4][:256], kept.images[0].reshape(-1, 3))
    fewer, _, _ = selection.squares(kept, Selection(percentile=0, limit=192))
    assert len(fewer) == pytest.approx(4 * 192, rel=0.25)
    width = np.linalg.norm(vertices[1::4] - vertices[::4], axis=1).mean()
    assert np.linalg.norm(fewer[1::4] - fewer[::4], axis=1).mean() == pytest.approx(2 * width, rel=0.1)


def test_surfaces_of_many_pixels_take_fewer_rows_and_columns(kept: Scene) -> None:
    smooth = replace(kept, depth=tuple(np.full((16, 16), 2.0) for _ in range(3)))
    assert len(np.unique(selection.triangles(smooth, EVERYTHING)[2])) == 768
    fewer = Selection(percentile=0, limit=200)
    vertices, colours, faces = selection.triangles(smooth, fewer)
    assert len(np.unique(faces)) == len(vertices) == 3 * 8 * 8
    np.testing.assert_array_equal(vertices[:64], smooth.points(0)[::2, ::2].reshape(-1, 3))
    np.testing.assert_array_equal(colours[:64], smooth.images[0][::2, ::2].reshape(-1, 3))
    assert selection.surfaces_suit(smooth, fewer)


def test_surfaces_suit_smooth_depth_and_not_scattered_depth(kept: Scene) -> None:
    smooth = replace(kept, depth=tuple(np.full((16, 16), 2.0) for _ in range(3)))
    assert selection.surfaces_suit(smooth, EVERYTHING)
    random = np.random.default_rng(0)
    scattered = replace(kept, depth=tuple(random.uniform(1, 3, (16, 16)) for _ in range(3)))
    assert not selection.surfaces_suit(scattered, EVERYTHING)
    assert not selection.surfaces_suit(smooth, Selection(confidence=1e9))


def test_selections(kept: Scene) -> None:
    everything = len(selection.cloud(kept, Selection(percentile=0))[0])
    assert len(selection.cloud(kept, Selection(percentile=50))[0]) == pytest.approx(everything / 2, abs=2)
    assert len(selection.cloud(kept, Selection(percentile=0, frame=1))[0]) == everything / 3
    assert len(selection.cloud(kept, Selection(limit=10))[0]) == 10
    least, most = min(c.min() for c in kept.confidence), max(c.max() for c in kept.confidence)
    with pytest.raises(InputError, match=f"between {least:.3g} and {most:.3g}"):
        selection.cloud(kept, Selection(confidence=1e9))
    with pytest.raises(InputError, match="No surface is left"):
        selection.triangles(kept, Selection(confidence=1e9))
    with pytest.raises(InputError, match="between 0 and 100"):
        Selection(percentile=100)


def test_hidden_by_a_less_sure_point() -> None:
    made = room(6, views=3, size=8)
    scene = alignment.align(made.predictions, 5)
    scene.depth[0] *= 0.5
    scene.confidence[0] = 1.5
    cleaned = alignment.clean(scene)
    assert float((cleaned.confidence[0] == 0).double().mean()) > 0.3
    photos = [Photo(x, Affine(), f"{n}.png") for n, x in enumerate(made.views.image[0])]
    shown = selection.masks(Scene.of(scene, photos), Selection(percentile=0, clean=True))
    assert [mask.sum() for mask in shown] == (cleaned.confidence > 0).sum(1).tolist()


def test_the_sky_is_blue_or_pale_and_reaches_the_upper_edge() -> None:
    image = np.full((12, 8, 3), (120, 90, 60), np.uint8)
    image[:4, :4], image[:3, 4:] = (90, 150, 230), 250
    image[8:10] = (90, 150, 230)  # a blue lake
    found = selection.sky(image)
    assert found.sum() == 16 + 12
    assert not found[8:].any()
