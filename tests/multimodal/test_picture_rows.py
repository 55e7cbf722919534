"""Rows of pictures: every layout people use, everything used or named, errors by line."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.errors import InputError
from pipelines.multimodal.messages import PLACE, with_pictures
from studio.training.language import rows
from tests.multimodal.conftest import settings, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def of(folder: Path, *given: dict[str, Any], **changes: Any) -> rows.Rows:
    return rows.pictured(settings(Path("any"), write_rows(folder / "rows.jsonl", list(given)), **changes))


def test_layouts_of_the_same_row(folder):
    """A question column, messages with parts, <image> in the text, the layout of LLaVA's own data, several pictures."""
    told = {"role": "assistant", "content": "red"}
    same = [
        {"image": "a.png", "question": "hue?", "answer": "red"},
        {"file_name": "a.png", "prompt": "<image>hue?", "completion": "red"},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"},
                                                   {"type": "text", "text": "hue?"}]}, told]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hue?"}]}, told],
         "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                                   {"type": "text", "text": "hue?"}]}, told]},
        {"image": "a.png", "messages": [{"role": "user", "content": "hue?"}, told]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nhue?"},
                                             {"from": "gpt", "value": "red"}]},
    ]  # fmt: skip
    for row in same:
        item = of(folder, row).shown[0]
        assert [picture.path for picture in item.pictures] == [folder / "a.png"], row
        assert with_pictures(item.talk.messages, ["picture"]) == [
            {"role": "user", "content": [{"type": "image", "image": "picture"}, {"type": "text", "text": "hue?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ], row
    two = of(folder, {"images": ["a.png", "b.png"], "question": "<image> or <image>?", "answer": "both"}).shown[0]
    assert two.talk.messages[0]["content"] == f"{PLACE} or {PLACE}?"
    assert [picture.name for picture in two.pictures] == ["a.png", "b.png"]


def test_csv_absolute_paths_and_bytes(folder):
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer"], [str(folder / "b.png"), "hue?", "red"]])
    found = rows.pictured(settings(Path("any"), folder / "rows.csv"))
    assert found.shown[0].pictures[0].open().size == (4, 4)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    stream = io.BytesIO()
    Image.new("RGB", (5, 3), "blue").save(stream, "PNG")
    table = {"image": [{"bytes": stream.getvalue(), "path": None}], "question": ["hue?"], "answer": ["blue"]}
    parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    kept = rows.pictured(settings(Path("any"), folder / "rows.parquet")).shown[0].pictures[0]
    assert kept.open().size == (5, 3)
    assert len(kept.digest()) == 64


def test_what_is_not_used_is_named(folder):
    found = of(folder, {"image": "a.png", "question": "hue?", "answer": "red", "source": "web", "system": "Be brief."})
    assert found.remarks == ["columns that are not used: source"]
    assert found.shown[0].talk.messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "c.png", "question": "q", "answer": "a"}, r"line 1: there is no picture 'c\.png'"),
        ({"image": "", "question": "q", "answer": "a"}, "line 1: it has no picture"),
        ({"image": "https://x/y.png", "question": "q", "answer": "a"}, "address on the network"),
        ({"image": "a.png", "question": "<image><image>", "answer": "a"}, "more places"),
        ({"images": ["a.png", "b.png"], "question": "<image>q", "answer": "a"}, "1 of its pictures have no place"),
        ({"image": "a.png", "question": "q\ufffc", "answer": "a"}, r"U\+FFFC"),
        ({"image": 3, "question": "q", "answer": "a"}, "not a path but int"),
        ({"image": "a.png", "question": "q", "answer": ""}, "'answer' is empty"),
        ({"image": "a.png", "answer": "a"}, "training needs 'image', 'question' and 'answer'"),
        ({"image": "a.png", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type 'video'"),
    ],
)
def test_rows_that_cannot_be_used(folder, row, said):
    with pytest.raises(InputError, match=said):
        of(folder, row)
    if "line" in said:
        kept = of(folder, row, {"image": "a.png", "question": "q", "answer": "a"}, skip_broken=True)
        assert len(kept.shown) == 1
        assert "1 row is left out" in kept.remarks[0]
