"""Asking about pictures: the session, the command, Python, and another process answer the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import studio
from adapters.errors import InputError
from studio.cli.app import run as command
from studio.conversation import Question, Variant, variants_of
from studio.conversation.session import Session
from studio.training.tasks.vision_language import run
from tests.language.conftest import Watcher
from tests.multimodal.conftest import settings


@pytest.fixture(scope="module")
def colours(llava, sights, tmp_path_factory) -> Path:
    """An adapter that changes what is said."""
    made = run(settings(llava, sights, steps=12, learning_rate=5e-2), tmp_path_factory.mktemp("run"), Watcher())
    return Path(made["adapter"])


def by_transformers(base: Path, picture: Path, question: str) -> str:
    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
    inputs = processor(text=f"USER: <image>\n{question} ASSISTANT:", images=Image.open(picture), return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_every_way_to_ask_gives_the_same_answer(llava, sights, colours, capsys):
    picture = sights.parent / "pictures" / "green.png"
    told = by_transformers(llava, picture, "hue?")
    assert studio.ask(picture, "hue?", base=llava, max_tokens=6).strip() == told
    changed = studio.ask(Image.open(picture), "hue?", [str(colours)], base=llava, max_tokens=6).strip()
    assert changed != told
    assert studio.ask(picture, "hue?", f"{colours}:0", base=llava, max_tokens=6).strip() == told
    flags = ["--base", str(llava), "-a", str(colours), "--max-tokens", "6", "--compare", "--json", "-q"]
    assert command(["ask", str(picture), "hue?", *flags]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["text"] for answer in answers] == [told, changed]


def test_the_picture_stands_in_the_first_question_of_a_longer_talk(llava, sights):
    """Later turns keep the picture; sent as JSON, as another process gets it, the question is the same."""
    session, picture = Session(), str(sights.parent / "pictures" / "red.png")
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hue?"},
            {"role": "assistant", "content": "red"}, {"role": "user", "content": "sure?"})  # fmt: skip
    question = Question(str(llava), (Variant("base"),), (talk,), "cpu", "fp32", {"max_tokens": 4}, picture=picture)
    again = Question.from_json(json.loads(json.dumps(question.as_json())))
    assert again == question
    first, second = ("".join(event.get("text", "") for event in session.ask(asked) if event["event"] == "piece")
                     for asked in (question, again))  # fmt: skip
    assert first == second != ""


def test_stopping(llava, sights):
    """Between two pieces, and between two variants."""
    session, picture = Session(), str(sights.parent / "pictures" / "red.png")
    variants = variants_of([], True) * 2
    talks = (({"role": "user", "content": "hue?"},),) * 2
    question = Question(str(llava), variants, talks, "cpu", "fp32", {"max_tokens": 100}, picture=picture)
    seen = []
    for event in session.ask(question, lambda: any(one["event"] == "piece" for one in seen)):
        seen.append(event)
    assert [event["event"] for event in seen].count("piece") == 1
    assert [event["event"] for event in seen].count("begin") == 1


def test_refusals(llava, sights, tmp_path, capsys):
    from tests.language import tiny as texts

    picture = str(sights.parent / "pictures" / "red.png")
    assert command(["ask", "no.png", "hue?", "--base", str(llava)]) == 2
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(InputError, match="does not look at pictures"):
        studio.ask(picture, "hue?", base=texts.llama(tmp_path / "llama"))
    with pytest.raises(InputError, match="write a question first"):
        studio.ask(picture, " ", base=llava)
    with pytest.raises(InputError, match=r"more than the 256 this model can read"):
        studio.ask(picture, "hue?", base=llava, max_tokens=250)
    with pytest.raises(InputError, match="looks at pictures"):
        studio.load(llava)
