"""The table of what regions cost: a model measured later stands beside the others."""

from __future__ import annotations

import json

from benchmarks import regions


def row(model, parameters, activation):
    ratios = dict.fromkeys(regions.NAMES, 1.0) | {"activation": activation}
    return {
        "model": model, "parameters": parameters, "steps": 2, "seconds": {"plain": 1.0}, "ratios": ratios,
        "refinement_seconds": 0.1, "rounds": 1, "date": "2026-11-28",
    }  # fmt: skip


def test_rows_of_other_models_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "RESULTS", tmp_path)
    memory = {
        "model": "large", "model_mib": 9, "adapters_mib": {"1": 1, "4": 4}, "peak_mib": {"1": 20, "4": 23},
        "growth_mib": 3,
    }  # fmt: skip
    for one, used in ((row("large", 9e6, 1.3), memory), (row("small", 1e6, 1.1), None), (row("large", 9e6, 1.2), None)):
        regions.write(one, used)
    content = json.loads((tmp_path / "regions.json").read_text(encoding="utf-8"))
    assert [(known["model"], known["ratios"]["activation"]) for known in content["rows"]] == [
        ("small", 1.1),
        ("large", 1.2),
    ]
    assert content["memory"] == memory
    lines = (tmp_path / "regions.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| small (1.0 M) | 2026-11-28 | 1 | 2 | 1.0 | 1.10x |")]
