"""Checks the data before anything is loaded: what would be trained on, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio.datasets.pictures import scan
from studio.training.schemas.image import TrainImageConfig
from studio.training.supply import prompts


def check_data(config: TrainImageConfig) -> dict[str, Any]:
    """Report on the folder of ``config``; only a missing folder or unreadable captions are errors.

    Returns:
        ``pictures`` (how many are usable), ``broken`` (name -> reason), ``uncaptioned`` (names), ``smallest`` and
        ``largest`` (width, height; None without pictures), ``prompts`` (the first five as the model will see them),
        ``remarks`` (what is not used, or not used as it is).
    """
    report = scan(Path(config.data).expanduser())
    by_area = sorted((picture.size for picture in report.pictures), key=lambda size: size[0] * size[1])
    return {
        "pictures": len(report.pictures),
        "broken": dict(report.broken),
        "uncaptioned": list(report.uncaptioned),
        "smallest": by_area[0] if by_area else None,
        "largest": by_area[-1] if by_area else None,
        "prompts": list(prompts(report.pictures[:5], config)),
        "remarks": list(report.remarks),
    }
