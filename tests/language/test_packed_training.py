"""Several adapters trained together on one base: each equals its own separate training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.layers import packed as shared
from adapters.progress import Progress, Silent
from studio import jobs, library
from studio.cli.app import run as command
from studio.jobs import monitor, store
from studio.jobs.execute import execute
from studio.training.drivers import packed
from studio.training.records import read_curve
from studio.training.tasks.language import run
from tests.language import tiny
from tests.language.conftest import Watcher, settings, write_rows


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


def together(folder: Path, *configs: Any) -> list[Any]:
    """Outcomes of the trainings in ``folder/0``, ``folder/1`` ..."""

    def work(number: int, config: Any) -> packed.Work:
        return lambda member: run(config, folder / str(number), Watcher(), member=member)

    return packed.run([work(number, config) for number, config in enumerate(configs)])


def alone(folder: Path, *configs: Any) -> list[dict[str, Any]]:
    return [run(config, folder / str(number), Watcher()) for number, config in enumerate(configs)]


def assert_same(one: dict[str, Any], other: Any) -> None:
    """The same adapter to 1e-6, and a result of the same form."""
    if isinstance(other, BaseException):
        raise other
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["steps"] == other["steps"]


@pytest.fixture
def passes(monkeypatch):
    """Rows of every shared pass, by batch; batches of any length share it."""
    seen: list[list[int]] = []
    real = packed.stacked

    def watched(batches: Any, *more: Any) -> Any:
        seen.append(sorted(len(batch["input_ids"]) for batch in batches))
        return real(batches, *more)

    monkeypatch.setattr(packed, "stacked", watched)
    monkeypatch.setattr(packed, "PADDING", 1.0)
    return seen


@pytest.fixture(scope="module")
def three(bases, chats, tmp_path_factory):
    """Ranks, scales, rates, optimisers, schedules, clipping, accumulation, dropout, data, lengths of their own."""
    folder = tmp_path_factory.mktemp("three")
    rows = [{"prompt": f"Say {word} {n} times?", "completion": word * n} for n in (2, 3, 4) for word in ("ab", "cde")]
    longer, base = write_rows(folder / "longer.jsonl", rows), bases("llama")
    return [
        settings(base, chats, steps=6, name="first"),
        settings(base, longer, steps=3, rank=4, alpha=2, learning_rate=3e-3, batch_size=3, gradient_accumulation=2,
                 targets="attention", lr_schedule="cosine", max_grad_norm=0.1, validation_split=0.3, name="second"),
        settings(base, chats, steps=5, rank=3, use_rslora=True, optimizer="sgd", learning_rate=0.1, batch_size=2,
                 seed=5, dropout=0.3, loraplus_ratio=4, name="third"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(three, tmp_path_factory):
    """The three trained one after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path_factory.mktemp("home")))
        return alone(tmp_path_factory.mktemp("alone"), *three)


def test_only_batches_of_similar_length_share_a_pass(three, expected, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(packed, "PADDING", 0.1)
    for one, other in zip(expected, together(tmp_path, *three), strict=True):
        assert_same(one, other)
    assert [2, 3, 4] not in passes, "the longer rows of the second go alone"
    assert [2, 4] in passes


def test_a_member_is_a_job_of_its_own_that_is_cancelled_and_resumed_alone(three, expected, passes, monkeypatch):
    """The others, and one that fails, leave nothing behind; what is resumed ends like the uninterrupted run."""
    monkeypatch.setattr(monitor, "_ASK_EVERY", 0.0)

    class Canceller(Silent):
        done = False

        def report(self, progress: Progress) -> None:
            if not self.done and progress.metrics.get("third") and progress.step >= 6:  # two steps of each
                self.done = True
                (third,) = [job for job in jobs.list(4) if job.config["name"] == "third"]
                jobs.cancel(third.id)

    broken = three[1].model_copy(update={"target_regex": "nothing", "name": "broken"})
    found = jobs.run_together_here("train-language", {c.name: c for c in (*three, broken)}, Canceller())
    assert [job.status for job in found] == ["done", "done", "cancelled", "failed"]
    assert "nothing" in found[3].error
    assert passes[0] == [2, 3, 4]
    assert [job.id for job in jobs.packed(found[0].id)] == [job.id for job in found]
    assert jobs.log(found[0].id).count("rows as") == 1, "a log is the job's own"
    assert "stopped on request" in jobs.log(found[2].id)
    done = jobs.resume_here(found[2].id, Silent())
    assert jobs.packed(done.id) == []
    for job, one in zip((*found[:2], done), expected, strict=True):
        assert_same(one, job.result)
        assert library.find(job.result["library"]).path.is_dir()
        rows = [row for row in jobs.history(job.id) if row.loss is not None]
        assert [row.step for row in rows] == list(range(1, one["steps"] + 1))
        assert len(read_curve(job.folder / "loss.csv")) == one["steps"]
        assert (job.folder / "card.md").is_file()
    assert found[1].result["validation"][-1] == pytest.approx(expected[1]["validation"][-1], rel=1e-5)
    files = {place.name for place in Path(expected[0]["adapter"]).iterdir()}
    assert files == {place.name for place in Path(found[0].result["adapter"]).iterdir()}


def test_methods_samples_in_a_row_and_a_new_head_share_a_pass(bases, chats, tmp_path, passes):
    """A start from gradients, several samples in a row with noise on the weights, a DoRA classifier, experts."""
    labelled = [{"text": word * n, "label": word} for word in ("ab", "xyz") for n in range(1, 6)]
    texts, base = write_rows(tmp_path / "labelled.jsonl", labelled), bases("llama")
    configs = [
        settings(base, chats, steps=2, init="lora_ga", init_batches=2),
        settings(base, chats, steps=2, packing=True, perturb="ggpo", ema=True),
        settings(base, texts, steps=2, task="classification", rank=4, use_dora=True),
        settings(base, chats, steps=2, method="mixlora", learning_rate=1e-3),
    ]
    expected = alone(tmp_path / "alone", *configs)
    for one, other in zip(expected, together(tmp_path / "packed", *configs), strict=True):
        assert_same(one, other)
    assert [len(batches) for batches in passes] == [4, 4]


def test_recomputed_activations_and_updates_as_one_product(bases, chats, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(shared, "SMALL", 10.0)
    configs = [settings(bases("llama"), chats, steps=2, gradient_checkpointing=True, rank=rank) for rank in (2, 3)]
    expected = alone(tmp_path / "alone", *configs)
    for one, other in zip(expected, together(tmp_path / "packed", *configs), strict=True):
        assert_same(one, other)
    assert len(passes) == 2


@pytest.mark.slow
def test_mixtures_of_experts(bases, chats, three, expected, tmp_path, passes):
    """Blocks and linear layers, losses of routers, dropout, and frozen adapters whose gates a classifier makes."""
    finished = ",".join([expected[0]["adapter"], expected[2]["adapter"]])
    changes = [
        {"method": "llava-mole"}, {"method": "loramoe", "dropout": 0.2}, {"method": "mola", "batch_size": 3},
        {"method": "x-lora", "experts": finished},
    ]  # fmt: skip
    configs = [settings(bases("llama"), chats, steps=3, learning_rate=1e-3, **values) for values in changes]
    separate = alone(tmp_path / "alone", *configs)
    for one, other in zip(separate, together(tmp_path / "packed", *configs), strict=True):
        assert_same(one, other)
    assert [len(batches) for batches in passes] == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tasks"), [("bert", ("masked", "classification")), ("gpt2", ("causal", "causal"))])
def test_other_architectures(name, tasks, tmp_path, passes):
    """Their own dropout is off: it would be drawn for all rows at once."""
    base = {"bert": tiny.bert, "gpt2": tiny.gpt2}[name](tmp_path / "base")
    place = base / "config.json"
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop",
                         "attn_pdrop"), 0.0)  # fmt: skip
    place.write_text(json.dumps(json.loads(place.read_text()) | off))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "abc def" * n, "label": str(n % 2)} for n in range(1, 7)])
    configs = [settings(base, rows, steps=3, task=task, rank=rank) for rank, task in enumerate(tasks, 2)]
    expected = alone(tmp_path / "alone", *configs)
    for one, other in zip(expected, together(tmp_path / "packed", *configs), strict=True):
        assert_same(one, other)
    assert len(passes) == 3


# ------------------------------------------------------------------------------------------------ asking for it


def written(folder: Path, *configs: Any) -> list[str]:
    files = []
    for number, config in enumerate(configs):
        files.append(str(folder / f"{number}.yaml"))
        Path(files[-1]).write_text(config.to_yaml())
    return files


def test_the_command_trains_several_files(bases, chats, tmp_path, capsys):
    configs = [settings(bases("llama"), chats, steps=steps, rank=steps, name=f"ab{steps}") for steps in (1, 2)]
    assert command(["train", "language", "--jobs", *written(tmp_path, *configs), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [(one["status"], one["steps"]) for one in made] == [("done", 1), ("done", 2)]
    assert [jobs.get(one["job"]).config["name"] for one in made] == ["ab1", "ab2"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": "other"}, "1.yaml: base is "),
        ({"dtype": "bf16"}, "1.yaml: dtype is 'bf16', but 'auto' in "),
        ({"gradient_checkpointing": True}, "1.yaml: gradient_checkpointing is 'True'"),
        ({"neftune_alpha": 5}, "1.yaml: neftune_alpha needs the base alone"),
        (None, "at least two"),
    ],
)
def test_what_cannot_be_together_is_one_sentence(changes, told, bases, chats, tmp_path, capsys):
    base = bases("llama")
    values = dict(changes or {})
    if "base" in values:
        values["base"] = str(bases("other"))
    configs = [settings(base, chats), settings(base, chats).model_copy(update=values)]
    files = written(tmp_path, *configs[: 1 if changes is None else 2])
    before = len(jobs.list(1000))
    assert command(["train", "language", "--jobs", *files]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert len(jobs.list(1000)) == before
    if changes is not None:
        assert command(["train", "language", *files]) == 2
        assert "--jobs" in capsys.readouterr().err


def test_waiting_jobs_are_put_together(bases, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "ensure_worker", lambda: None)
    base = bases("llama")
    ids = [jobs.submit("train-language", settings(base, chats, steps=1, name=f"m{n}")) for n in (1, 2)]
    other = jobs.submit("train-language", settings(bases("other"), chats, steps=1))
    assert [job.id for job in jobs.mates(ids[0])] == [ids[1]]
    assert command(["jobs", "together", ids[0], other]) == 2
    assert f"Job {other}: base is" in " ".join(capsys.readouterr().err.split())
    assert command(["jobs", "together", *ids]) == 0
    execute(ids[0])
    assert [jobs.get(job).status for job in (*ids, other)] == ["done", "done", "queued"]
    assert execute(ids[1]) is None, "its turn in the queue comes when it is done"
    assert command(["jobs", "together", *ids]) == 2
    jobs.cancel(other)
    assert len(store.together(ids[0])) == 2
    jobs.delete(ids[1])
    assert len(store.together(ids[0])) == 1
