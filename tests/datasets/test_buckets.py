"""Bucket arithmetic."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InputError
from studio.datasets.buckets import BucketRule, place
from studio.datasets.sampling import batches_per_epoch, epoch_batches

RULE = BucketRule(resolution=512, shortest=256, longest=1024, step=64)
side = st.integers(16, 4000)


def test_sizes_have_the_area_and_the_step():
    assert (512, 512) in RULE.sizes()
    for width, height in RULE.sizes():
        assert width % 64 == height % 64 == 0
        assert width * height <= 512**2
        assert min(width, height) >= 256
        assert max(width, height) <= 1024
        assert (height, width) in RULE.sizes()


@given(side, side)
def test_assigned_bucket_is_the_nearest_shape(width, height):
    bucket = RULE.assign((width, height))

    def distance(size):
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert bucket in RULE.sizes()
    assert distance(bucket) <= min(distance(size) for size in RULE.sizes()) + 1e-9


@given(side, side)
def test_without_upscaling_nothing_grows(width, height):
    rule = BucketRule(resolution=512, shortest=128, longest=1024, step=64, upscale=False)
    if min(width, height) < 128:
        with pytest.raises(InputError, match="smaller than the smallest bucket"):
            rule.assign((width, height))
        return
    bucket = rule.assign((width, height))
    assert bucket[0] <= width
    assert bucket[1] <= height
    assert bucket[0] % 64 == bucket[1] % 64 == 0


@given(side, side, st.floats(0, 1), st.floats(0, 1))
def test_placement_covers_the_bucket_and_keeps_the_shape(width, height, x, y):
    bucket = RULE.assign((width, height))
    found = place((width, height), bucket, x, y)
    assert 0 <= found.left <= found.resized[0] - bucket[0]
    assert 0 <= found.top <= found.resized[1] - bucket[1]
    scale = max(bucket[0] / width, bucket[1] / height)
    assert abs(found.resized[0] - width * scale) <= 1
    assert abs(found.resized[1] - height * scale) <= 1


def test_squares_only():
    rule = BucketRule(resolution=100, shortest=50, longest=200, step=16, keep_aspect=False)
    assert rule.assign((1000, 10)) == (96, 96)
    with pytest.raises(InputError, match="below the bucket step"):
        BucketRule(resolution=8, shortest=8, longest=8, step=16)


@given(
    st.lists(st.sampled_from([(64, 64), (96, 48), (48, 96)]), min_size=1, max_size=30),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_epochs_show_everything_in_full_batches(buckets, batch, repeats, seed):
    batches = epoch_batches(buckets, batch, repeats, random.Random(seed))
    assert len(batches) == batches_per_epoch(buckets, batch, repeats)
    assert all(len(members) == batch for members in batches)
    assert all(len({buckets[member] for member in members}) == 1 for members in batches)
    shown = [member for members in batches for member in members]
    assert all(shown.count(picture) >= repeats for picture in range(len(buckets)))
    assert batches == epoch_batches(buckets, batch, repeats, random.Random(seed))
