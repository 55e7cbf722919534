"""The image trainer as a job: stopped, resumed, and in the library at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio import jobs, library
from studio.cli.app import run as command
from studio.training import saved
from tests import tiny
from ui.components import training_run
from ui.pages import jobs as pages


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    """A training of six steps on a tiny random model."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 20, 90)).save(folder / "data" / f"{number}.png")
    return {
        "base": str(tiny.saved("sd", folder)), "data": str(folder / "data"), "trigger": "zxq", "name": "zebra",
        "resolution": 32, "rank": 2, "steps": 6, "checkpoint_every": 2, "device": "cpu",
    }  # fmt: skip


class _StopAt:
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def report(self, progress: Progress) -> None:
        if progress.stage == "training":
            self.seen = progress.step

    def cancelled(self) -> bool:
        return self.seen >= self.step


def test_a_stopped_training_goes_on_to_the_same_adapter(values):
    whole = jobs.run_here("train-image", values, Silent())
    with pytest.raises(Cancelled):
        jobs.run_here("train-image", values, _StopAt(3))
    stopped = jobs.get("last")
    assert stopped.status == "cancelled"
    done = jobs.resume_here(stopped.id, Silent())
    assert (done.id, done.status) == (stopped.id, "done")
    expected, found = (load_file(Path(job.result["adapter"])) for job in (whole, done))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [whole.result["library"], done.result["library"]] == ["zebra", "zebra-2"]
    assert library.find("zebra").triggers == ("zxq",)
    losses = [row.loss for row in jobs.history(done.id) if row.loss is not None]
    assert len(losses) >= 6


def test_cancel_and_keep_keeps_every_saved_step(values, monkeypatch, capsys):
    with pytest.raises(Cancelled):
        jobs.run_here("train-image", {**values, "name": "lion", "steps": 8, "sample_steps": 1}, _StopAt(5))
    job = jobs.get("last")
    assert list(saved.steps(job)) == [2, 4, 5]
    assert command(["jobs", "keep", job.id, "--step", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"library": "lion-step-4", "steps": [2, 4, 5]}
    record = library.find("lion-step-4")
    assert record.preview is not None, "the sample drawn at that step"
    assert library.sha256(record.path) == library.sha256(saved.steps(job)[4])
    assert training_run.add_to_library(job, 4) == "lion-step-4", "once is enough"
    assert training_run.add_to_library(job) == "lion-step-5"
    assert command(["jobs", "keep", job.id, "--step", "3"]) == 2
    assert "there are 2, 4, 5" in capsys.readouterr().err
    done = jobs.resume_here(job.id, Silent())
    assert done.seconds > job.seconds == done.earlier > 0
    assert list(saved.steps(done)) == [4, 5, 6, 8]
    assert training_run.add_to_library(done, 8) == done.result["library"] == "lion"
    drawn = training_run.pair(done) + pages.describe(done)
    assert "without-0.png" in drawn
    assert "<td>lion</td>" in drawn
    assert "config.yaml" in drawn
    assert "seed" in pages.describe(job)


def test_what_only_the_base_can_tell_is_a_failed_job_with_a_sentence(values, tmp_path):
    with pytest.raises(InputError):
        jobs.run_here("train-image", {**values, "rank": 999}, Silent())
    job = jobs.get("last")
    assert job.status == "failed"
    assert not job.error.startswith("Unexpected")
