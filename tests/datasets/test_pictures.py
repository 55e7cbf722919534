"""Reading folders: pictures, captions, and what they become."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image

from adapters.errors import InputError
from studio.datasets.buckets import place
from studio.datasets.cache import TensorCache, fingerprint, key_of
from studio.datasets.captions import compose_caption, vary_caption
from studio.datasets.pictures import open_picture, read_pixels, scan, usable_pictures
from studio.datasets.plan import Augmentation, PictureSet, Plan


def picture(path, size=(8, 6), colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_captions_from_text_files_and_metadata(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.jpg")
    picture(tmp_path / ".hidden" / "c.png")
    (tmp_path / "a.txt").write_text("\ufeffa  red\nthing ", encoding="utf-8")
    report = scan(tmp_path)
    assert [(p.path.name, p.caption) for p in report.pictures] == [("a.png", "a red thing"), ("b.jpg", None)]
    assert report.uncaptioned == ["sub/b.jpg"]
    rows = [{"file_name": "sub/b.jpg", "text": "a blue thing"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.caption for p in scan(tmp_path).pictures] == ["a red thing", "a blue thing"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,prompt\nsub/b.jpg,"one, two"\n')
    assert [p.caption for p in scan(tmp_path).pictures] == ["a red thing", "one, two"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"file_name": "x.png", "text": "t"}', "name 1 pictures that are not there: x.png"),
        ('{"file_name": "a.png"}', "must give file_name and text"),
        ("[1]", "must give file_name and text"),
        ("{", "Line 1 of .* is not JSON"),
    ],
)
def test_bad_metadata(text, sentence, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=sentence):
        scan(tmp_path)


def test_captions_must_be_text(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        scan(tmp_path)


def test_broken_pictures_are_reported(tmp_path):
    picture(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    report = scan(tmp_path)
    assert set(report.broken) == {"cut.png", "empty.png"}
    assert len(usable_pictures(tmp_path, skip_broken=True).pictures) == 1


def test_transparency_becomes_white_and_cameras_are_turned(tmp_path):
    layer = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    layer.save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    turned = Image.new("RGB", (6, 2), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (2, 6)


def test_pixels_are_cut_and_mirrored(tmp_path):
    half = Image.new("RGB", (8, 4), "black")
    half.paste((255, 255, 255), (0, 0, 4, 4))
    half.save(tmp_path / "half.png")
    left = read_pixels(tmp_path / "half.png", place((8, 4), (4, 4), x=0.0), flip=False)
    assert left.shape == (3, 4, 4)
    assert bool((left == 1).all())
    middle = read_pixels(tmp_path / "half.png", place((8, 4), (4, 4)), flip=False)
    mirrored = read_pixels(tmp_path / "half.png", place((8, 4), (4, 4)), flip=True)
    assert torch.equal(middle.flip(-1), mirrored)


def test_prompts():
    assert compose_caption(None, instance_prompt="a picture of {trigger}", trigger="zxq") == "a picture of zxq"
    assert compose_caption("a cat", trigger="zxq") == "zxq, a cat"
    assert compose_caption("a zxq cat", trigger="zxq") == "a zxq cat"
    assert compose_caption("a cat", template="{caption} in {trigger} style", trigger="zxq") == "a cat in zxq style"
    assert compose_caption("a cat", prefix="photo: ") == "photo: a cat"
    assert compose_caption(None, trigger="zxq") == "zxq"


def test_captions_vary_as_asked():
    dice = random.Random(0)
    seen = {vary_caption("zxq, a, b, c", dice, shuffle=True, keep=1) for _ in range(50)}
    assert len(seen) == 6
    assert all(text.startswith("zxq, ") for text in seen)
    dropped = [vary_caption("a", dice, dropout=0.25) == "" for _ in range(2000)]
    assert 0.2 < sum(dropped) / len(dropped) < 0.3
    assert vary_caption("a, b", dice) == "a, b"


def test_plan_is_a_function_of_its_seed(tmp_path):
    for name in "abcde":
        picture(tmp_path / f"{name}.png")
    found = scan(tmp_path).pictures
    shown = PictureSet(tuple(found), tuple("abcde"), ((8, 8),) * 5)
    prior = PictureSet(tuple(found[:2]), ("class",) * 2, ((4, 4),) * 2)
    options = {"repeats": 2, "augmentation": Augmentation(True, True, 0.5, True), "seed": 3}
    plan = Plan(shown, prior, batch_size=2, **options)
    other = Plan(shown, prior, batch_size=2, **options)
    assert plan.epoch_length == 5
    assert [plan.batch(n) for n in range(12)] == [other.batch(n) for n in reversed(range(12))][::-1]
    picks, classes = plan.batch(7)
    assert [pick.number for pick in picks] == [14, 15] == [pick.number for pick in classes]
    assert all(pick.caption == "class" and pick.placement.size == (8, 8) for pick in classes)
    halves = [Plan(shown, None, batch_size=1, processes=2, rank=rank, **options) for rank in (0, 1)]
    one = Plan(shown, None, batch_size=2, **options)
    for number in range(12):
        assert one.batch(number)[0] == [half.batch(number)[0][0] for half in halves]


def test_cache_computes_once_and_survives_damage(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.ones(2)}

    for cache in (TensorCache(), TensorCache(tmp_path)):
        calls.clear()
        key = key_of("picture", (64, 64))
        assert key not in cache
        for _ in range(2):
            assert torch.equal(cache.get(key, compute)["x"], torch.ones(2))
        assert len(calls) == 1
        assert key in cache
    (tmp_path / f"{key}.safetensors").write_bytes(b"half")
    TensorCache(tmp_path).get(key, compute)
    assert len(calls) == 2


def test_keys_and_fingerprints_tell_things_apart():
    assert key_of("a", "bc") != key_of("ab", "c")
    layer = torch.nn.Linear(3, 3)
    before = fingerprint(layer)
    assert before == fingerprint(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert fingerprint(layer) != before
