"""The share of a coarse cell is the area of it that the region really covers, at every size of the picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.diffusion.regions.masks import Place, grids

SIDES = st.integers(2, 90)


def painted(rows: tuple[int, int], columns: tuple[int, int], height: int, width: int) -> torch.Tensor:
    made = torch.zeros(height, width)
    made[rows[0] : rows[1], columns[0] : columns[1]] = 1
    return made


def pooled(fine: torch.Tensor, factor: int) -> torch.Tensor:
    """Block means of ``fine``; the last blocks are as small as they come."""
    return torch.stack([torch.stack([part.mean() for part in band.split(factor, 1)]) for band in fine.split(factor, 0)])


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, scale=st.sampled_from([1, 3, 8]), data=st.data())
def test_every_level_has_the_area_that_is_covered(height: int, width: int, scale: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    fine = painted((top, bottom), (left, right), height, width)
    box = Place((left / width, top / height, right / width, bottom / height), None)
    mask = Place(None, fine.repeat_interleave(scale, 0).repeat_interleave(scale, 1))
    for level, (rows, columns) in enumerate(grids(height, width)):
        wanted = pooled(fine, 2**level)
        assert wanted.shape == (rows, columns)
        for place in (box, mask):
            assert float((place.soft(rows, columns) - wanted).abs().max()) < 1e-5
        assert torch.equal(box.hard(rows, columns), (wanted > 1 - 1e-5).float())


@settings(max_examples=40, deadline=None)
@given(side=st.integers(3, 70), cut=st.floats(0.05, 0.95), level=st.integers(0, 4))
def test_a_cut_inside_a_cell_keeps_the_area(side: int, cut: float, level: int) -> None:
    rows, columns = grids(side, side)[min(level, len(grids(side, side)) - 1)]
    share = Place((0.0, 0.0, cut, 1.0), None).soft(rows, columns)[0].double()
    factor = 2 ** min(level, len(grids(side, side)) - 1)
    widths = torch.tensor([min((cell + 1) * factor, side) - cell * factor for cell in range(columns)]).double()
    assert float((share * widths).sum() / side) == pytest.approx(cut, abs=1e-5)


@pytest.mark.parametrize("side", [8, 16, 48, 64, 96])
def test_where_sides_halve_evenly_nothing_has_changed(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    mask = Place(None, torch.rand(side * 8, side * 8, generator=generator))
    box = Place((0.1, 1 / 3, 0.77, 2 / 3), None)
    for level, (rows, columns) in enumerate(grids(side, side)):
        if side % 2**level:
            break
        for place in (box, mask):
            assert torch.equal(place.soft(rows, columns), place.soft(int(rows), int(columns)))
            assert torch.equal(place.hard(rows, columns), place.hard(int(rows), int(columns)))
