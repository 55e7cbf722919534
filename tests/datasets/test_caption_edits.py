"""Captions of a whole set: one for all, find and replace, tags; through functions, command and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

from adapters.errors import InputError
from studio.cli.app import run
from studio.datasets import caption_edits as edits
from studio.datasets.captioner import Captioner
from studio.datasets.pictures import scan
from ui import pictures as page
from ui.components import caption_tools

CAPTIONS = {"a": "red fox, snow", "b": "", "c": "fox, foxglove, snow, "}


def test_tags_are_counted_once_a_caption():
    assert edits.tag_counts(CAPTIONS | {"d": "snow, snow"}) == [
        ("snow", 3), ("fox", 1), ("foxglove", 1), ("red fox", 1)
    ]  # fmt: skip


def test_one_for_all_or_where_there_is_none():
    assert set(edits.same_for_all(CAPTIONS, "a  dog\n").values()) == {"a dog"}
    assert edits.same_for_all(CAPTIONS, "a dog", only_missing=True) == CAPTIONS | {"b": "a dog"}


def test_find_and_replace():
    assert edits.replaced(CAPTIONS, "fox", "zxq")["c"] == "zxq, zxqglove, snow,"
    assert edits.replaced(CAPTIONS, "fox", "zxq", whole_words=True)["c"] == "zxq, foxglove, snow,"
    assert edits.replaced({"a": "costs $5 (new)"}, "$5 (", r"\1 (")["a"] == r"costs \1 (new)"  # words, no pattern
    with pytest.raises(InputError, match="nothing to find"):
        edits.replaced(CAPTIONS, "", "x")


def test_tags_are_added_once_and_taken_out_whole():
    added = edits.with_tags(CAPTIONS, ["snow", "ice"])
    assert added == {"a": "red fox, snow, ice", "b": "snow, ice", "c": "fox, foxglove, snow, ice"}
    assert edits.without_tags(CAPTIONS, ["fox"]) == CAPTIONS | {"c": "foxglove, snow"}


def folder_of(place: Path, **captions: str) -> Path:
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(place / f"{name}.png")
    for name, text in captions.items():
        (place / f"{name}.caption").write_text(text)
    return place


def captions_of(folder: Path) -> dict[str, str | None]:
    return {picture.path.name: picture.caption for picture in scan(folder).pictures}


def test_the_file_that_holds_the_caption_is_written(tmp_path):
    folder_of(tmp_path, red="old")
    Image.new("RGB", (8, 8)).save(tmp_path / "blue.jpg")
    written = edits.write_folder(tmp_path, {"red.png": "new", "blue.png": "b", "blue.jpg": ""})
    assert sorted(file.name for file in written) == ["blue.png.txt", "red.caption"]
    assert captions_of(tmp_path) == {"red.png": "new", "blue.png": "b", "blue.jpg": None}
    with pytest.raises(InputError, match=r"no picture 'lost\.png'"):
        edits.write_folder(tmp_path, {"lost.png": "x"})
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "listed"}))
    with pytest.raises(InputError, match=r"are in '.*metadata\.jsonl'"):
        edits.write_folder(tmp_path, {"red.png": "newer"})
    assert captions_of(tmp_path)["red.png"] == "listed"


def test_command(tmp_path, capsys):
    folder_of(tmp_path, red="a fox, snow", blue="snow")
    change = ["data", "caption", str(tmp_path), "--find", "fox", "--replace", "zxq", "--add", "ice", "--remove", "snow"]
    assert run([*change, "--dry-run"]) == 0
    assert "2 of 2 captions would be changed" in capsys.readouterr().out
    assert captions_of(tmp_path) == {"red.png": "a fox, snow", "blue.png": "snow"}
    assert run(change) == 0
    assert captions_of(tmp_path) == {"red.png": "a zxq, ice", "blue.png": "ice"}
    capsys.readouterr()
    assert run(["data", "show", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pictures"], found["tags"]) == (2, [["ice", 2], ["a zxq", 1]])
    assert run(["data", "caption", str(tmp_path)]) == 2
    assert "There is nothing to change" in capsys.readouterr().err


@pytest.fixture(scope="session")
def captioner(tmp_path_factory):
    """A small BLIP that has learnt to tell red from blue."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "sheet"]
    split = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 16, "bos_token_id": 2,
            "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}  # fmt: skip
    config = BlipConfig(vision_config={**small, "image_size": 16, "patch_size": 8}, text_config={**small, **text},
                        projection_dim=16)  # fmt: skip
    model = BlipForConditionalGeneration(config)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    pixels = images([Image.new("RGB", (20, 20), name) for name in ("red", "blue")], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[2, 4, 5, 7, 3], [2, 4, 6, 7, 3]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        model(pixel_values=pixels, input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("captioner")
    model.save_pretrained(folder)
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_a_model_writes_captions(captioner, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    data = tmp_path / "data"
    data.mkdir()
    folder_of(data, blue="by hand")
    assert (
        run(["data", "caption", str(data), "--model", str(captioner), "--device", "cpu", "--only-missing", "-q"]) == 0
    )
    assert captions_of(data) == {"red.png": "a red sheet", "blue.png": "by hand"}
    place = page.uploads() / "one"
    place.mkdir(parents=True)
    folder_of(place)
    items, _ = page.receive([place / "blue.png", place / "red.png"])
    items = caption_tools.by_model(items, str(captioner), "", False)
    assert [item["caption"] for item in items] == ["a blue sheet", "a red sheet"]


def test_what_is_no_captioner_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no image-to-text model"):
        Captioner(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="does not turn pictures into text"):
        Captioner(tmp_path)


def test_page():
    items = [{"id": name, "name": name, "caption": text} for name, text in CAPTIONS.items()]
    assert "snow (2)" in caption_tools.tag_list(items)
    assert "&lt;b&gt;" in caption_tools.tag_list([{"id": "x", "caption": "<b>"}])
    assert caption_tools.tag_list([]) == ""
    assert [item["caption"] for item in caption_tools.same_for_all(items, "x", True)] == [
        CAPTIONS["a"],
        "x",
        CAPTIONS["c"],
    ]
    assert caption_tools.replaced(items, "fox", "zxq", True)[0]["caption"] == "red zxq, snow"
    assert caption_tools.change_tags(items, "ice", "snow")[0]["caption"] == "red fox, ice"
    assert items[0]["caption"] == CAPTIONS["a"]
