"""Awkward files through every door: the same pixels and the same words everywhere."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from adapters.errors import InputError
from pipelines import pictures as reader
from pipelines.geometry.images import read_photo
from studio.cli.app import run
from studio.datasets.buckets import place
from studio.datasets.captions import compose_caption, read_text, vary_caption
from studio.datasets.folders import walk
from studio.datasets.pictures import read_pixels, scan, usable_pictures
from studio.training.check import check_data
from studio.training.schemas.image import TrainImageConfig
from studio.training.supply import cut_away
from ui import pictures as page

SIZE = (64, 64)


def _profile(swap=True):
    """A colour profile whose red and blue are exchanged (their columns of the sRGB profile are)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if swap:
        red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
        data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def _save(image, suffix, **options):
    def write(file):
        image.save(file, **options)

    return suffix, write


RAMP = np.tile(np.linspace(0, 65535, 64), (64, 1))
RED, BLUE = (255, 0, 0), (0, 0, 255)


def _turned():
    made = Image.new("RGB", (64, 64), BLUE)
    made.paste(RED, (0, 0, 64, 32))
    exif = made.getexif()
    exif[0x0112] = 3  # upside down
    return _save(made, ".png", exif=exif)


def _palette():
    made = Image.new("P", SIZE, 1)
    made.putpalette([9, 9, 9, 200, 100, 50])
    return made


def _frames():
    first, second = Image.new("RGB", SIZE, RED), Image.new("RGB", SIZE, BLUE)
    return _save(first, ".gif", save_all=True, append_images=[second])


FILES = {
    "deep-grey-png": (_save(Image.fromarray(RAMP.astype(np.uint16)), ".png"), (0, 32), (130, 130, 130)),
    "deep-grey-tiff": (_save(Image.fromarray(RAMP.astype(np.uint16)), ".tif"), (0, 32), (130, 130, 130)),
    "float-tiff": (_save(Image.fromarray((RAMP / 65535).astype(np.float32)), ".tiff"), (0, 32), (130, 130, 130)),
    "turned": (_turned(), (0, 0), BLUE),
    "other-colours": (_save(Image.new("RGB", SIZE, RED), ".png", icc_profile=_profile()), (0, 0), BLUE),
    "plain-profile": (
        _save(Image.new("RGB", SIZE, (200, 90, 60)), ".png", icc_profile=_profile(False)), (0, 0), (200, 90, 60)
    ),
    "clear": (_save(Image.new("RGBA", SIZE, (255, 0, 0, 0)), ".PNG", format="PNG"), (0, 0), (255, 255, 255)),
    "half-clear-grey": (_save(Image.new("LA", SIZE, (0, 128)), ".png"), (0, 0), (127, 127, 127)),
    "palette": (_save(_palette(), ".png"), (0, 0), (200, 100, 50)),
    "clear-palette": (_save(_palette(), ".gif", transparency=1), (0, 0), (255, 255, 255)),
    "windows-jpeg": (_save(Image.new("RGB", SIZE, (128, 128, 128)), ".jfif", format="JPEG"), (0, 0), (128, 128, 128)),
    "animation": (_frames(), (0, 0), RED),
    "cmyk": (_save(Image.new("CMYK", SIZE, (0, 255, 255, 0)), ".tif"), (0, 0), RED),
    "lying-name": (_save(Image.new("RGB", SIZE, BLUE), ".jpg", format="PNG"), (0, 0), BLUE),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_door_reads_the_same(name, tmp_path, home, capsys):
    (suffix, write), (row, column), wanted = FILES[name]
    folder = page.uploads() / name
    folder.mkdir(parents=True)
    file = folder / f"{name}{suffix}"
    write(file)
    (folder / f"{name}.caption").write_text("a thing,\r\nred\u2028and  blue\n", encoding="utf-16")
    pixels = np.asarray(reader.open_picture(file))
    assert np.abs(pixels[row, column].astype(int) - wanted).max() <= 1
    photo = read_photo(file, size=64, patch=16, square_ok=True)
    np.testing.assert_allclose(photo.pixels.permute(1, 2, 0) * 255, pixels, atol=1e-3)
    learnt = read_pixels(file, place(SIZE, SIZE), flip=False)
    np.testing.assert_allclose((learnt.permute(1, 2, 0) + 1) * 127.5, pixels, atol=1e-3)
    report = usable_pictures(folder)
    assert [(p.size, p.caption) for p in report.pictures] == [(SIZE, "a thing, red and blue")]
    assert check_data(TrainImageConfig(name="x", data=str(folder), mode="captioned"))["prompts"] == [
        "a thing, red and blue"
    ]
    assert run(["data", "show", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["tags"], told["remarks"]) == ([["a thing", 1], ["red and blue", 1]], report.remarks)
    items, remarks = page.receive([file, folder / f"{name}.caption"])
    assert items[0]["caption"] == "a thing, red and blue"
    kept = usable_pictures(page.keep(items, "set"))
    assert [p.caption for p in kept.pictures] == ["a thing, red and blue"]
    assert np.array_equal(np.asarray(reader.open_picture(kept.pictures[0].path)), pixels)
    said = "the first of 2 frames is used"
    assert all((said in " ".join(texts)) == (name == "animation") for texts in (remarks, report.remarks))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))


def test_pictures_of_phones(tmp_path):
    pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    reader.read(_bytes(Image.new("RGB", SIZE, RED)))  # makes the kinds known
    for suffix in (".heic", ".jxl", ".avif"):
        Image.new("RGB", SIZE, (200, 60, 60)).save(tmp_path / f"a{suffix}", quality=95)
        assert np.abs(np.asarray(reader.open_picture(tmp_path / f"a{suffix}")).astype(int) - (200, 60, 60)).max() < 8


def test_kinds_without_their_library_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    monkeypatch.setattr(reader, "_formats", lambda: ["PNG"])
    with pytest.raises(reader.PictureError, match=r"'pillow-heif'.*adapter-studio"):
        reader.read(tmp_path / "a.HEIC")


def _bytes(image):
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.png", b"", "'a.png' cannot be read as a picture: empty file."),
        ("a.jpg", b"hello", "its content is of no known format"),
        ("a.png", _bytes(Image.new("RGB", SIZE))[:60], "cannot be read as a picture"),
        ("a.CR2", b"II*\0", ".cr2 files are not supported; save it as PNG or JPEG"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its content is of no known format"),
    ],
)
def test_unreadable_pictures_get_one_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(reader.PictureError) as error:
        reader.read(tmp_path / name)
    assert sentence in str(error.value)
    assert list(scan(tmp_path).broken.values()) == [error.value.reason]


def test_bombs_and_strange_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(reader, "LARGEST", 63 * 64)
    with pytest.raises(InputError, match="more than 0 million pixels"):
        reader.read(_bytes(Image.new("RGB", SIZE)))
    for values in ((0.0, 1.5), (-1.0, 1.0)):
        with pytest.raises(InputError, match="floats must be from 0 to 1"):
            reader.to_rgb(Image.fromarray(np.array([values], dtype=np.float32)))
    whole = reader.to_rgb(Image.fromarray(np.array([[0, 128, 255]], dtype=np.float32)))
    assert [whole.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_damaged_profile_is_said():
    image = Image.new("RGB", SIZE, RED)
    image.info["icc_profile"] = b"no profile"
    said: list[str] = []
    assert reader.to_rgb(image, said).getpixel((0, 0)) == RED
    assert "colour profile cannot be used" in said[0]


# ------------------------------------------------------------------------------------------------ folders


def _picture(file, size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file)


def test_linked_folders_are_read_once(tmp_path):
    data, far = tmp_path / "data", tmp_path / "far"
    _picture(data / "near.png")
    _picture(far / "far.png")
    (far / "far.txt").write_text("far away")
    (data / "linked").symlink_to(far)
    (data / "again").symlink_to(far)
    (far / "circle").symlink_to(data)
    (data / "lost.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(data / "pipe.png")
    report = scan(data)
    assert [(p.path.relative_to(data).as_posix(), p.caption) for p in report.pictures] == [
        ("again/far.png", "far away"), ("near.png", None)
    ]  # fmt: skip
    said = " ".join(report.remarks)
    assert "linked folder linked leads to one that was read already" in said
    assert "the link lost.png leads nowhere" in said
    assert len(walk(data).files) == 3


def test_what_is_not_used_is_said(tmp_path):
    _picture(tmp_path / "a.png")
    for name in ("a.txt", "a.caption", "b.txt", "film.mp4"):
        (tmp_path / name).write_text(name)
    report = scan(tmp_path)
    assert report.pictures[0].caption == "a.txt"
    assert report.remarks == [
        "a.png takes its caption from a.txt, not from a.caption",
        "1 files (b.txt) belong to no picture",
        "1 files (film.mp4) are not read",
    ]


@pytest.mark.parametrize("name", ["a.caption", "a.TXT", "a.png.txt", "a.tags"])
def test_caption_endings(name, tmp_path):
    _picture(tmp_path / "a.png")
    (tmp_path / name).write_text("a red fox")
    assert scan(tmp_path).pictures[0].caption == "a red fox"


def test_full_name_before_stem(tmp_path):
    for name in ("a.png", "a.jpg"):
        _picture(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text(f"of {name}")
    assert [p.caption for p in scan(tmp_path).pictures] == ["of a.jpg", "of a.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(encoding, tmp_path):
    (tmp_path / "a.txt").write_text("größer 狐\r\n", encoding=encoding)
    assert read_text(tmp_path / "a.txt").strip() == "größer 狐"


def test_metadata_by_the_standard(tmp_path):
    for folder in ("", "one", "two"):
        _picture(tmp_path / folder / "1.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"a ""red"" square\r\non white"\n', newline="")
    row = json.dumps({"file_name": "1.png", "text": "a red\u2028square\u0085here"}, ensure_ascii=False)
    (tmp_path / "one" / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    (tmp_path / "two" / "metadata.csv").write_text("file_name,caption\n1.png,second\n")
    captions = [p.caption for p in scan(tmp_path).pictures]
    assert captions == ['a "red" square on white', "a red square here", "second"]


# ------------------------------------------------------------------------------------------------ words


def test_trigger_counts_as_a_whole_word():
    assert compose_caption("a party", trigger="art") == "art, a party"
    assert compose_caption("modern art.", trigger="art") == "modern art."
    assert compose_caption("a zxq-fox", trigger="zxq") == "a zxq-fox"


def test_empty_tags_are_dropped():
    import random

    for caption in ("zxq, fox,, snow, ", ", zxq, fox, snow"):
        seen = {vary_caption(caption, random.Random(seed), shuffle=True) for seed in range(20)}
        assert seen == {"zxq, fox, snow", "zxq, snow, fox"}


def test_page_keeps_captions_with_their_pictures(home):
    def drop(folder, colour):
        place = page.uploads() / folder
        place.mkdir(parents=True)
        Image.new("RGB", SIZE, colour).save(place / "001.png")
        (place / "001.txt").write_text(colour)
        return [place / "001.png", place / "001.txt"]

    items, _ = page.receive(drop("one", "red"))
    items, problems = page.receive(drop("two", "blue"), items)
    assert [item["caption"] for item in items] == ["red", "blue"]
    assert problems == []
    late = page.uploads() / "late" / "001.txt"
    late.parent.mkdir()
    late.write_text("which?")
    items, problems = page.receive([late], items)
    assert [item["caption"] for item in items] == ["red", "blue"]
    assert "could belong to 2 pictures" in problems[0]


def test_a_picture_that_is_cut_is_named(tmp_path):
    from studio.datasets.plan import PictureSet

    _picture(tmp_path / "thin.png", (400, 10))
    _picture(tmp_path / "wide.png", (16, 8))
    found = tuple(scan(tmp_path).pictures)
    assert cut_away(PictureSet(found, ("", ""), ((32, 16), (32, 16)))) == [
        "thin.png (400 x 10) is so long that 95% of it is cut off"
    ]
