"""The core of Trans-LoRA: what is an input and an answer, margins, chance, and rejection sampling."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.errors import InputError
from adapters.generation.trans_lora import (
    HEAD,
    Synthesis,
    TaskTemplate,
    distinct,
    few_shot,
    judged,
    margin,
    normalised,
    read_input,
)


def test_real_and_written_inputs_are_read_alike():
    seeds = ["one\ntwo", "three"]
    assert few_shot(seeds, chat=False) == f"{HEAD}\none\ntwo\n\n{HEAD}\nthree\n\n{HEAD}\n"
    assert f"{HEAD}\nthree" in few_shot(seeds, chat=True)
    for written in ("four  \n five\n", f"\n\nfour\n five\n\n{HEAD}\nsix", f"{HEAD}\nfour\n five"):
        assert read_input(written) == "four\n five" == normalised("  four \n five ")
    assert read_input(f"{HEAD}\n\n{HEAD}") == ""


@pytest.mark.parametrize(
    ("values", "inputs", "others", "answers", "wrong"),
    [
        ({}, ["x"], ["", " x", f"x\n{HEAD}\ny"], ["y"], ["", " "]),
        ({"form": "choice"}, ["Which?\nA) 1\nB) 2"], ["Which?", "A) 1"], ["A", "(B) 2"], ["Always", "1"]),
        ({"form": "math"}, ["1 + 1"], [], ["It is 2."], ["two"]),
        ({"form": "code"}, ["add"], [], ["a = 1", "So:\n```python\na = 1\n```"], ["a = ", "```\nif\n```"]),
        ({"form": "classification", "labels": ("good", "bad")}, ["x"], [], ["good"], ["goodness"]),
        ({"input_pattern": "^q", "answer_pattern": "!$"}, ["q1"], ["1q"], ["y!"], ["y"]),
    ],
)
def test_forms_of_inputs_and_answers(values, inputs, others, answers, wrong):
    template = TaskTemplate(**values)
    assert all(map(template.takes_input, inputs))
    assert not any(map(template.takes_input, others))
    assert all(map(template.takes_answer, answers))
    assert not any(map(template.takes_answer, wrong))


def test_the_question_keeps_braces_of_the_input():
    assert TaskTemplate(question="{yes}/{no}? {input}").asked("a {yes} {b}") == "Yes/No? a {yes} {b}"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"form": "poem"}, "form must be one of free, choice"),
        ({"input_pattern": "("}, "input_pattern is no regular expression"),
        ({"question": "Is it?"}, "needs {input}"),
        ({"yes": "No"}, "needs two different answers"),
        ({"no": " "}, "needs two different answers"),
        ({"form": "classification"}, "needs its labels"),
    ],
)
def test_templates_that_cannot_be_meant_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        TaskTemplate(**values)


def test_margin_and_chance():
    assert margin(torch.tensor([[1.0, 4.0, 2.5]]), 1, 2).tolist() == [1.5]
    found = judged([1.0, 2.0, -1.0], [-1.0, 0.0, 3.0])
    assert (found.accepted, found.rejected, found.accuracy) == (2, 2, 4 / 6)
    assert found.p_chance == pytest.approx((15 + 6 + 1) / 64)


def test_distinct_shows_a_generator_that_has_collapsed():
    assert distinct(["a b", "a b"], 1) == 0.5 == distinct(["a b", "a b"], 2)
    assert distinct(["a b", "c d"], 2) == 1.0
    assert distinct(["a"], 2) == 0.0


def draw(synthesis, text, margin=None, answer="y"):
    outcome = synthesis.judge(text, margin, answer)
    synthesis.take(text, outcome)
    return outcome


def test_kept_are_new_above_tau_and_answered():
    synthesis = Synthesis(2, TaskTemplate(), ["a seed of it"], tau=0.5)
    assert draw(synthesis, "", 9.0) == "unreadable"
    assert draw(synthesis, "a seed of it", 9.0) == "repeated"
    assert draw(synthesis, "A seed  of it", 9.0) == "repeated"
    assert draw(synthesis, "another thing", 0.5) == "rejected"
    assert draw(synthesis, "another thing", 0.6, "") == "unanswered"
    assert draw(synthesis, "another thing", 0.6) == "kept"
    assert draw(synthesis, "another thing", 0.6) == "repeated"
    assert not synthesis.full
    assert draw(synthesis, "a third matter", 7.0) == "kept"
    assert synthesis.full
    assert synthesis.kept == ["another thing", "a third matter"]
    assert (synthesis.drawn, synthesis.acceptance) == (8, 0.25)


def test_near_repeats_are_left_out_unless_only_exact_ones_are_meant():
    one, other = "the quick brown fox jumps over the lazy dog", "the quick brown fox jumps over the lazy dogs"
    assert draw(Synthesis(2, TaskTemplate(), [one], None), other) == "repeated"
    exact = Synthesis(3, TaskTemplate(), [one], None, near=1.1)
    assert [draw(exact, text) for text in (other, other, one)] == ["kept", "repeated", "repeated"]


def test_without_a_filter_margins_are_not_looked_at():
    synthesis = Synthesis(2, TaskTemplate(), [], None)
    assert draw(synthesis, "one", -9.0) == "kept" == draw(synthesis, "two", math.nan)


def test_too_few_that_are_kept_end_with_the_acceptance_rate():
    synthesis = Synthesis(5, TaskTemplate(), ["seed"], tau=0.0, tries=4)
    draw(synthesis, "first", 1.0)
    for number in range(6):
        draw(synthesis, f"{number} no", -1.0)
    with pytest.raises(InputError, match=r"Only 1 of 8 .* \(acceptance 12.5%; 1 repeated .*, 6 were rejected .*Lower"):
        draw(synthesis, "seed")


def test_a_generator_that_only_repeats_is_told_so():
    synthesis = Synthesis(2, TaskTemplate(), ["seed"], None, tries=3)
    draw(synthesis, "seed")
    draw(synthesis, "Seed")
    with pytest.raises(InputError, match=r"acceptance 0.0%; 3 repeated earlier ones.*Raise temperature"):
        draw(synthesis, "seed")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"wanted": 0}, "must be 1 or more"),
        ({"tries": 0}, "must be 1 or more"),
        ({"tau": math.nan}, "tau must be a finite number"),
        ({"tau": math.inf}, "tau must be a finite number"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Synthesis(**{"wanted": 1, "template": TaskTemplate(), "seeds": []} | values)


def test_a_margin_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="gives no number"):
        Synthesis(1, TaskTemplate(), []).judge("x", math.nan)
