"""The embedded vision-language model and the program that made it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

import assets
import studio
from assets.build import data, vlm
from pipelines.multimodal.answer import processed
from pipelines.multimodal.loading import open_model, open_processor
from pipelines.multimodal.messages import PLACE, with_pictures
from studio import library


@pytest.fixture(scope="module")
def scene() -> data.Scene:
    placed = data.place(np.random.default_rng(0), ("cat", "star"))
    return data.Scene("flat", placed, "yellow", "")


def test_questions_are_answered_by_the_scene(scene):
    rng = np.random.default_rng(1)
    assert vlm.ask_what(scene, rng)[1] == "a cat and a star"
    assert {vlm.ask_side(scene, rng) for _ in range(20)} == {
        ("What is on the left?", "a cat"), ("What is on the right?", "a star"),
    }  # fmt: skip
    assert {vlm.ask_where(scene, rng) for _ in range(20)} == {
        ("Where is the cat?", "on the left"), ("Where is the star?", "on the right"),
    }  # fmt: skip
    assert [ask(scene, rng)[1] for ask in (vlm.ask_count, vlm.ask_colour, vlm.ask_style)] == ["two", "yellow", "flat"]
    for question, answer in (vlm.ask_whether(scene, rng) for _ in range(20)):
        assert (answer == "yes") == (question in ("Is there a cat?", "Is there a star?"))
    covered = vlm.covered(scene).reshape(8, 8)
    names = list(data.BASE_CONCEPTS)
    assert set(np.unique(covered[:, :4])) == {0, names.index("cat") + 1}
    assert set(np.unique(covered[:, 4:])) == {0, names.index("star") + 1}


def test_training_writes_what_the_processor_writes():
    """Tokens and learnt parts of a training conversation are those of the shipped processor."""
    processor = open_processor(str(assets.path("models/tinysight")))
    asked = [("What is it?", "a cat"), ("How many are there?", "one")]
    tokens, labels = vlm.conversation(asked)
    talk = [
        {"role": "user", "content": f"{PLACE}What is it?"}, {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "How many are there?"}, {"role": "assistant", "content": "one"},
    ]  # fmt: skip
    written = processed(processor, [with_pictures(talk, [Image.new("RGB", (9, 9))])], False)
    assert written["input_ids"][0].tolist() == tokens
    learnt = processor.tokenizer.decode([token for token in labels if token != vlm.IGNORED])
    assert learnt == " a cat</s> one</s>"


def test_it_is_small_known_to_the_library_and_answers():
    place = assets.path("models/tinysight")
    assert (place / "model.safetensors").stat().st_size < 4_000_000
    assert AutoConfig.from_pretrained(place).model_type == "llava"
    record = next(record for record in library.bases() if record.name == "tinysight")
    assert (record.family, record.problem) == ("vision-language", "")
    assert open_model(place).language == "model.language_model"
    scores = json.loads((place / "scores.json").read_text())
    assert scores["what"]["with 1"][0] / scores["what"]["with 1"][1] > 0.8
    assert studio.ask(place / "examples" / "rose.png", "What is it?").strip() == "a rose"
