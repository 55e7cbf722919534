"""Distillation as a job and a command, and what composing does with its adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio import jobs, library, settings
from studio.cli.app import run
from studio.composition import distilled_adapters
from studio.composition import job as compose
from studio.composition.schema import ComposeConfig
from tests import tiny
from tests.studio.files import diffusers_lora

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.saved("sd", tmp_path_factory.mktemp("model"))


@pytest.fixture
def values(model, tmp_path) -> dict[str, object]:
    """A distillation of four steps on a tiny random model."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return {
        "base": str(model), "prompts": str(tmp_path / "prompts.txt"), "name": "swift", "knots": 3, "rank": 2,
        "trajectory_count": 2, "steps": 4, "batch_size": 2, "resolution": 32, "device": "cpu", "guidance": 4.0,
        "checkpoint_every": 2, "sample_every": 0,
    }  # fmt: skip


class _StopAt(Silent):
    seen = 0

    def report(self, progress: Progress) -> None:
        self.seen = progress.step if progress.stage == "training" else 0

    def cancelled(self) -> bool:
        return self.seen >= 2


def test_a_stopped_distillation_goes_on_and_is_in_the_library(values):
    whole = jobs.run_here("distill", values, Silent())
    with pytest.raises(Cancelled):
        jobs.run_here("distill", values, _StopAt())
    done = jobs.resume_here(jobs.get("last").id, Silent())
    expected, found = (load_file(Path(job.result["adapter"])) for job in (whole, done))
    assert all((expected[name] == found[name]).all() for name in expected)
    record = library.find(whole.result["library"])
    assert record.notes["description"] == "distilled, guidance 4 built in"
    assert distilled_adapters.of(record.path) == distilled_adapters.Distilled("fixed", 4.0, 4.0, 4.0)


def test_the_embedding_goes_along_into_the_library(values):
    result = jobs.run_here("distill", {**values, "guidance_mode": "embedding", "name": "input"}, Silent()).result
    record = library.find(result["library"])
    beside = distilled_adapters.companion(record.path)
    assert beside is not None
    assert beside.read_bytes() == Path(result["exports"]["w-embedding"]).read_bytes()
    assert not any(distilled_adapters.EMBEDDING in other.name for other in library.adapters())


def test_commands_choose_what_suits_and_refuse_a_second_guidance(values, model, tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert run(["train", "distill", *flags, "--objective", "consistency", "--folder", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "swift.safetensors"
    assert str(file) in capsys.readouterr().out
    assert distilled_adapters.suited({"adapters": [{"path": str(file)}]}) == {
        "guidance_scale": 1.0, "steps": 4, "scheduler": "lcm"
    }  # fmt: skip
    assert distilled_adapters.suited({"adapters": [{"path": str(file), "weight": 0}, {"path": "nobody"}]}) == {}
    common = ["compose", "--base", str(model), "--device", "cpu", "--prompt", "a cat", "--lora", str(file)]
    assert run([*common, "--plan"]) == 0
    assert "4 steps, 4 predictions per picture, " in capsys.readouterr().out
    assert run([*common, "--guidance-scale", "5", "--out", str(tmp_path / "x.png")]) == 2
    assert "set guidance_scale to 1" in capsys.readouterr().err
    doubled = [*common, "--guidance-scale", "5", "--allow-double-guidance", "--out", str(tmp_path / "x.png")]
    assert run(doubled) == 0


def test_a_job_with_guidance_of_its_own_is_refused(values, model, tmp_path):
    result = jobs.run_here("distill", values, Silent()).result
    config = ComposeConfig(base=str(model), prompt="a cat", steps=2, device="cpu", guidance_scale=5.0,
                           adapters=[{"path": result["adapter"]}])  # fmt: skip
    with pytest.raises(InputError, match="guidance_scale to 1"):
        compose.run(config, tmp_path, Silent())
    made = compose.run(config.model_copy(update={"guidance_scale": 1.0}), tmp_path, Silent())
    assert len(made["images"]) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "trajectories need prompts"),
        (["--prompts", "x", "--guidance", "1"], "nothing to distil"),
        (["--prompts", "x", "--resume"], "--resume needs --folder"),
        (["--prompts", "x", "--objektive", "y"], "No such option"),
    ],
)
def test_wrong_commands_end_with_a_sentence(flags, sentence, capsys):
    assert run(["train", "distill", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_an_embedding_follows_its_adapter_to_the_trash_and_stays_where_it_is_needed():
    place = settings.adapter_folders()[0]
    name = f"input{distilled_adapters.EMBEDDING}0123.safetensors"
    (place / name).write_bytes(b"embedding")
    for seed, adapter in enumerate(("one", "two")):
        diffusers_lora(place / f"{adapter}.safetensors", seed=seed, w_embedding=name)
    renamed = library.rename("one", "first")
    assert distilled_adapters.companion(renamed.path) == place / name  # as the renamed file says
    library.trash("two")
    assert (place / name).is_file()  # "first" needs it
    library.trash("first")
    assert not (place / name).exists()
    for adapter in ("two", "first"):
        assert distilled_adapters.companion(library.restore(adapter).path) in (None, place / name)
    assert distilled_adapters.companion(place / "two.safetensors") == place / name
    assert (place / name).read_bytes() == b"embedding"
    folder = place / "folder"
    folder.mkdir()
    (place / name).rename(folder / name)
    diffusers_lora(folder / "pytorch_lora_weights.safetensors", w_embedding=name)
    assert distilled_adapters.companion(library.find("folder").path) == folder / name  # a folder is one adapter with it
