"""The loss that teaches attention where each subject stands, against loops over places and words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from assets.build import grounding, text


@pytest.mark.parametrize(
    ("caption", "names", "found"),
    [
        ("a flat icon of a corn left of an unicorn", ["corn", "unicorn"], ["corn", "unicorn"]),
        ("an icon of a unicorn left of a corn", ["corn", "unicorn"], ["corn", "unicorn"]),
        ("an icon of on the left a red apple, on the right a dog", ["dog", "red apple"], ["dog", "red apple"]),
        ("an icon of a hotdog, a cat", ["dog", "cat"], ["", "cat"]),  # a whole word, or none
    ],
)
def test_spans_are_the_names(caption, names, found):
    assert [caption[start:end] for start, end in grounding.name_spans(caption, names)] == found


def test_tokens_of_a_subject_spell_its_name():
    tokenizer = text.tokenizer()
    captions = ["a flat icon of a red apple left of a dog, blue background", "an icon of a sun"]
    names = [["red apple", "dog"], ["sun"]]
    marks = grounding.subject_tokens(tokenizer, captions, names, text.LENGTH)
    assert marks.shape == (2, grounding.MOST, text.LENGTH)
    coded = tokenizer(captions, padding="max_length", max_length=text.LENGTH)["input_ids"]
    for row, subjects in enumerate(names):
        for k in range(grounding.MOST):
            words = tokenizer.decode([token for token, mark in zip(coded[row], marks[row, k], strict=True) if mark])
            assert words.strip() == (subjects[k] if k < len(subjects) else "")


def test_a_box_covers_its_area_and_each_cell_by_its_share():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.25, 0.5, 0.75, 0.625], [0.0, 0.0, 0.0, 0.0]])
    masks = grounding.box_masks(boxes, 4, 8).unflatten(-1, (4, 8))
    assert masks.shape == (3, 4, 8)
    assert torch.equal(masks[0], torch.cat([torch.ones(4, 4), torch.zeros(4, 4)], 1))
    expected = torch.zeros(4, 8)
    expected[2, 2:6] = 0.5  # half of the row's height
    assert torch.allclose(masks[1], expected, atol=1e-6)
    assert masks[2].sum() == 0
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert torch.allclose(masks.mean((1, 2)), areas, atol=1e-6)


@pytest.fixture
def scenes():
    """Attention maps of two layers (2 x 4 and 4 x 8 places, 5 words), which words name whom, and boxes."""
    generator = torch.Generator().manual_seed(0)
    seen = [torch.randn(3, 2, places, 5, generator=generator, dtype=torch.float64).softmax(-1) for places in (8, 32)]
    marks = torch.zeros(3, grounding.MOST, 5, dtype=torch.bool)
    marks[0, 0, 1] = marks[0, 1, 2] = marks[0, 1, 3] = True  # two subjects, one of two words
    marks[1, 0, 4] = True  # one subject: not a pair
    marks[2, 0, 0] = marks[2, 1, 2] = marks[2, 2, 4] = True
    boxes = torch.zeros(3, grounding.MOST, 4, dtype=torch.float64)
    boxes[0, 0], boxes[0, 1] = torch.tensor([0.0, 0.1, 0.4, 0.9]), torch.tensor([0.5, 0.2, 0.9, 1.0])
    boxes[1, 0] = torch.tensor([0.2, 0.2, 0.8, 0.8])
    boxes[2, :] = torch.tensor([[0.0, 0.0, 0.3, 1.0], [0.3, 0.1, 0.6, 0.7], [0.7, 0.5, 1.0, 1.0]])
    return seen, marks, boxes


def by_hand(seen, marks, boxes, aspect):
    """The loss as its equations read, place by place."""
    total = 0.0
    for layer in seen:
        rows = round(math.sqrt(layer.shape[2] / aspect))
        columns = aspect * rows
        terms = []
        for b in range(len(layer)):
            subjects = [k for k in range(grounding.MOST) if marks[b, k].any()]
            if len(subjects) < 2:
                continue
            maps = {
                k: [np.mean([[float(layer[b, h, u, t]) for t in range(5) if marks[b, k, t]] for h in range(2)])
                    for u in range(rows * columns)] for k in subjects
            }  # fmt: skip
            for k in subjects:
                left, top, right, bottom = boxes[b, k].tolist()
                inside = weight = told = 0.0
                for u in range(rows * columns):
                    y, x = divmod(u, columns)
                    high = max(0.0, min(bottom, (y + 1) / rows) - max(top, y / rows)) * rows
                    wide = max(0.0, min(right, (x + 1) / columns) - max(left, x / columns)) * columns
                    inside += high * wide * maps[k][u]
                    weight += high * wide
                    told += high * wide * math.log(maps[k][u] / sum(maps[j][u] for j in subjects))
                terms.append((1 - inside / sum(maps[k])) ** 2 - told / weight)
        total += float(np.mean(terms))
    return total / len(seen)


def test_the_loss_is_the_sum_over_places_and_words(scenes):
    seen, marks, boxes = scenes
    assert float(grounding.grounding_loss(seen, marks, boxes, aspect=2)) == pytest.approx(
        by_hand(seen, marks, boxes, 2), rel=1e-5
    )


def test_one_subject_teaches_nothing(scenes):
    seen, marks, boxes = scenes
    assert float(grounding.grounding_loss([layer[1:2] for layer in seen], marks[1:2], boxes[1:2], 2)) == 0
    assert float(grounding.grounding_loss(seen, torch.zeros_like(marks), boxes, 2)) == 0
    others = torch.tensor([0, 2])
    alone = grounding.grounding_loss([layer[others] for layer in seen], marks[others], boxes[others], 2)
    assert torch.allclose(alone, grounding.grounding_loss(seen, marks, boxes, 2))  # nor does it dilute the pairs


def test_the_gradient_is_the_slope(scenes):
    seen, marks, boxes = scenes
    layer = seen[0].clone().requires_grad_()
    grounding.grounding_loss([layer, seen[1]], marks, boxes, 2).backward()
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(layer.shape, generator=generator, dtype=layer.dtype)
    step = 3e-3  # the loss is computed in float32
    with torch.no_grad():
        up, down = (
            grounding.grounding_loss([layer + sign * step * direction, seen[1]], marks, boxes, 2) for sign in (1, -1)
        )
    assert float((layer.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=0.02)


def test_descending_moves_each_subjects_attention_into_its_box(scenes):
    _, marks, boxes = scenes
    scores = torch.zeros(3, 1, 32, 5, requires_grad=True)
    before = float(grounding.grounding_loss([scores.softmax(-1)], marks, boxes.float(), 2).detach())
    optimizer = torch.optim.Adam([scores], lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = grounding.grounding_loss([scores.softmax(-1)], marks, boxes.float(), 2)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before / 3
    seen = scores.detach().softmax(-1)[2, 0].unflatten(0, (4, 8))
    assert seen[:, :2, 0].mean() > 5 * seen[:, 3:, 0].mean()  # the first subject: left, with its word


def test_recording_changes_no_output():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip
    given = torch.randn(2, 2, 8, 16), torch.tensor([3, 7]), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = unet(*given).sample
        kept = grounding.record(unet)
        after = unet(*given).sample
    assert torch.allclose(before, after, atol=1e-5)
    assert len(kept) == 3  # one in the middle, two upwards; none downwards
    for recorder in kept:
        assert recorder.seen is not None
        assert recorder.seen.shape[0] == 2
        assert recorder.seen.shape[-1] == 5
        assert torch.allclose(recorder.seen.sum(-1), torch.ones(()), atol=1e-5)
