"""A kind of training is one file: a module with a schema, a task and a run, and nothing else edited."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.errors import Cancelled, InputError
from adapters.formats import read
from adapters.plugin import Handles, Plugin
from studio import jobs
from studio.jobs import kinds
from studio.training import checkpoint as checkpoints
from studio.training.records import read_curve
from tests.training.conftest import Watcher

TOY = '''
"""A line through points, learnt by a LoRA on a frozen linear layer."""

import json

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.files import write_text
from adapters.formats import LoraFile, write_peft
from adapters.plugin import Outputs
from studio.datasets.seeds import generator
from studio.jobs.kinds import Kind, register
from studio.training.drivers import accelerate as driver
from studio.training.schemas.base import AdapterTrainConfig
from studio.training.session import SILENT, TrainSession
from studio.training.task import Task


class LineConfig(AdapterTrainConfig):
    kind = "train-line"
    base: str = "line"
    device: str = "cpu"
    dtype: str = "fp32"
    slope: float = 2.0
    validation_every: int = 2


class LineTask(Task):
    data_noun = "points"

    def methods(self):
        return []

    def rows(self):
        self.points = torch.linspace(-1, 1, 8)[:, None].repeat(1, 4)

    def open(self, session):
        self.session = session
        self.base = nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False)
        nn.init.eye_(self.base[0].weight)

    def digest(self):
        return "eye"

    def encode(self):
        self.total, self.data_digest = self.config.steps, f"slope {self.config.slope}"

    def components(self):
        return {"model": self.base}

    def inject(self, models):
        self.learner = get_peft_model(models["model"], LoraConfig(r=self.config.rank, target_modules=["0"]))
        return {"model": self.learner}

    def trainee(self):
        return self.learner

    def collate(self, start, stop):
        for number in range(start, stop):
            yield torch.randint(len(self.points), (4,), generator=generator(self.config.seed, "data", number))

    def _loss(self, chosen):
        x = self.points[chosen]
        prediction, target = self.learner(x), self.config.slope * x
        losses = (prediction - target).pow(2).mean(1)
        return losses.mean(), Outputs(prediction, target, losses, torch.zeros(len(x)), len(x))

    def loss(self, batch):
        return self._loss(batch)

    measurable = True

    def measure(self):
        with torch.no_grad():
            return {"validation_loss": float(self._loss(torch.arange(8))[0])}

    def epoch(self, step):
        return step * self.config.batch_size / 8

    def facts(self):
        return {"family": "line"}, {"points": len(self.points), "digest": self.data_digest}

    def export(self, layers, folder, name, recipe):
        write_peft(LoraFile(layers, metadata={"recipe": json.dumps(recipe)}), folder / name)
        return {"peft": str(folder / name)}

    def card(self, recipe):
        return write_text(self.session.folder / "card.md", f"# {recipe['name']}: slope {recipe['config']['slope']}")


def run(config, folder, monitor=SILENT, resume=False, plugins=()):
    return driver.train(TrainSession.of(LineTask(config), folder, monitor, plugins), resume)


register(Kind("train-line", "toy_line:LineConfig", "toy_line:run", continues=True))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "toy_line.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    yield importlib.import_module("toy_line")
    sys.modules.pop("toy_line")


def config(toy: Any, **values: Any) -> Any:
    return toy.LineConfig.parse({"steps": 12, "learning_rate": 0.1, "rank": 2, "ema": True, **values})


class Noting(Plugin):
    """Joins from outside, and keeps its count in the checkpoints."""

    def __init__(self) -> None:
        self.steps, self.models = 0, ()

    def initialise(self, handles: Handles) -> None:
        self.models = tuple(handles.models)

    def after_step(self, step: int) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


def test_it_learns_and_exports(toy, tmp_path):
    result = toy.run(config(toy), tmp_path, Watcher())
    assert float(read_curve(tmp_path / "loss.csv")[-1]["validation_loss"]) < result["first_loss"] / 4
    layer = read(result["adapter"]).parts["model"]["0"]
    assert (layer.delta() @ torch.ones(4)).mean() > 0.3  # towards the slope of 2, from 1
    assert (tmp_path / "card.md").read_text() == "# adapter: slope 2.0"
    assert [row["step"] for row in read_curve(tmp_path / "loss.csv") if row["validation_loss"]] == [
        "2", "4", "6", "8", "10", "12",
    ]  # fmt: skip


def test_it_stops_and_resumes_to_the_bit(toy, tmp_path):
    whole = toy.run(config(toy), tmp_path / "whole", Watcher(), plugins=[Noting()])
    with pytest.raises(Cancelled, match="step 5 of 12"):
        toy.run(config(toy), tmp_path / "part", Watcher(stop_at=5), plugins=[Noting()])
    assert [place.name for place in checkpoints.existing(tmp_path / "part" / "checkpoints")] == ["step-000005"]
    resumed = toy.run(config(toy), tmp_path / "part", Watcher(), resume=True, plugins=[noting := Noting()])
    assert (noting.steps, noting.models) == (12, ("model",))
    first, second = (load_file(Path(made["adapter"]) / "adapter_model.safetensors") for made in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    losses = [[row["loss"] for row in read_curve(tmp_path / name / "loss.csv")] for name in ("whole", "part")]
    assert losses[0] == losses[1]


def test_it_resumes_the_same_run_only(toy, tmp_path):
    with pytest.raises(Cancelled):
        toy.run(config(toy), tmp_path, Watcher(stop_at=2))
    with pytest.raises(InputError, match=r"slope: 2\.0 -> 3\.0"):
        toy.run(config(toy, slope=3.0), tmp_path, resume=True)


def test_it_is_a_kind_of_job(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    job = jobs.run_here("train-line", {"steps": 3}, Watcher())
    assert job.result["steps"] == 3


def test_a_run_that_diverges_says_so(toy, tmp_path):
    rising = toy.run(config(toy, learning_rate=10.0, optimizer="sgd", steps=40), tmp_path / "rising")
    assert "probably diverged: the loss rose from" in rising["warning"]
    assert "Lower learning_rate (it is 10)" in rising["warning"]
    assert "warning" not in toy.run(config(toy), tmp_path / "usual")


def test_a_run_without_a_gradient_at_a_high_loss_ends(toy, tmp_path, monkeypatch):
    """Saturated: what a rate of 1e6 leaves behind."""
    loss = toy.LineTask.loss

    def saturates(task, batch):
        value, outputs = loss(task, batch)
        return (value if task.session.step < 2 else value * 0 + 100.0), outputs

    monkeypatch.setattr(toy.LineTask, "loss", saturates)
    with pytest.raises(InputError, match=r"has diverged: the loss rose .* no gradient is left.*Lower learning_rate"):
        toy.run(config(toy, steps=40), tmp_path)


def test_a_stopped_run_is_kept(toy, tmp_path, monkeypatch):
    """The checkpoint's weights, averaged as at the end; and the run can still go on."""
    whole = toy.run(config(toy), tmp_path / "whole")
    with pytest.raises(Cancelled):
        toy.run(config(toy), tmp_path / "part", Watcher(stop_at=5))
    from studio.training.drivers import accelerate
    from studio.training.session import TrainSession

    def kept(folder: Path) -> dict[str, Any]:
        return accelerate.train(TrainSession.of(toy.LineTask(config(toy)), folder, Watcher()), keep=True)

    result = kept(tmp_path / "part")
    assert result["steps"] == 5
    saved = checkpoints.load(checkpoints.existing(tmp_path / "part" / "checkpoints")[-1])
    assert saved.ema is not None
    averages = {tuple(value.flatten().tolist()) for value in saved.ema["shadow_params"]}
    tensors = load_file(Path(result["adapter"]) / "adapter_model.safetensors").values()
    assert {tuple(value.flatten().tolist()) for value in tensors} == averages
    again = toy.run(config(toy), tmp_path / "part", resume=True)
    assert read(again["adapter"]).parts["model"]["0"].A.equal(read(whole["adapter"]).parts["model"]["0"].A)
    with pytest.raises(InputError, match=r"no checkpoint .* could become an adapter"):
        kept(tmp_path / "whole" / "nothing")
