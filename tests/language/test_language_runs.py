"""The language driver: it learns, equals plain PEFT, resumes exactly, and what it saves is an ordinary adapter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adapters.errors import Cancelled, InputError
from studio.datasets.seeds import global_seed
from studio.training.checkpoint import existing
from studio.training.drivers.trainer import RunSampler
from studio.training.language.data import Collate
from studio.training.optimizers import lr_factor
from studio.training.records import read_curve
from studio.training.tasks.causal import check_packing
from studio.training.tasks.language import run
from tests.language.conftest import Watcher, samples_of, settings, write_rows


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_without_methods_it_is_plain_peft_to_the_bit(bases, chats, tmp_path):
    """Twenty steps of a loop written out here, with PEFT's own LoRA and torch's AdamW."""
    config = settings(bases("llama"), chats, steps=20)
    watcher = Watcher()
    made = weights(run(config, tmp_path / "run", watcher))

    model = AutoModelForCausalLM.from_pretrained(bases("llama")).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(bases("llama"))
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    with global_seed(config.seed, "init"):
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM"))
    samples = samples_of(config, tokenizer).shown
    order = list(RunSampler(len(samples), 20 * 4, config.seed))
    a = [p for name, p in peft.named_parameters() if "lora_A" in name]
    b = [p for name, p in peft.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.AdamW([{"params": a}, {"params": b}], lr=1e-2, weight_decay=0, fused=True)
    collate, losses = Collate(tokenizer.pad_token_id), []
    peft.train()
    for step in range(20):
        batch = collate([samples[number] for number in order[4 * step : 4 * step + 4]])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, 20, config)
        count = (batch["labels"][:, 1:] != -100).sum()
        logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows, wanted = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(rows, wanted, reduction="sum") / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert watcher.losses == pytest.approx(losses, rel=2e-6)
    state = {name: p for name, p in peft.state_dict().items() if "lora_" in name}
    for name, tensor in made.items():
        assert torch.allclose(tensor, state[name.replace(".weight", ".default.weight")], atol=1e-5), name
    assert losses[-1] < losses[0]


def test_stopped_and_resumed_is_the_uninterrupted_run(bases, chats, tmp_path):
    """With dropout, accumulation and several passes over the data; bit by bit, also the loss curve."""
    config = settings(bases("llama"), chats, steps=9, dropout=0.2, batch_size=2, gradient_accumulation=2,
                      validation_split=0.2, validation_every=3, sample_prompts=["red1?"], sample_every=4)  # fmt: skip
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled, match="step 4 of 9"):
        run(config, tmp_path / "part", Watcher(stop_at=4))
    assert [place.name for place in existing(tmp_path / "part" / "checkpoints")] == ["step-000004"]
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    assert same(weights(whole), weights(resumed))
    curves = [[row["loss"] for row in read_curve(tmp_path / name / "loss.csv")] for name in ("whole", "part")]
    assert curves[0] == curves[1]
    assert whole["validation"] == resumed["validation"]
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "part")]
    assert answers[0] == answers[1]


def test_a_running_average_is_saved_and_resumed(bases, chats, tmp_path):
    """Decay of the first steps is warmed up: the average of two steps is a known mixture of both."""
    config = settings(bases("llama"), chats, steps=6, ema=True, ema_decay=0.9)
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=3))
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    assert same(weights(whole), weights(resumed))
    last = []
    for n, on in ((1, False), (2, False), (2, True)):
        short = settings(bases("llama"), chats, steps=n, ema=on, lr_schedule="constant", warmup_ratio=0)
        last.append(weights(run(short, tmp_path / f"{n}-{on}", Watcher())))
    share = (1 + 1) / (10 + 1)  # decay of the second step
    for name, average in last[2].items():
        torch.testing.assert_close(average, share * last[0][name] + (1 - share) * last[1][name], rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="already averages"):
        settings(bases("llama"), chats, ema=True, optimizer="schedulefree-adamw")


def test_resume_refuses_another_configuration(bases, chats, tmp_path):
    with pytest.raises(Cancelled):
        run(settings(bases("llama"), chats), tmp_path, Watcher(stop_at=2))
    with pytest.raises(InputError, match="learning_rate"):
        run(settings(bases("llama"), chats, learning_rate=1e-3), tmp_path, Watcher(), resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text() + chats.read_text())
    chosen = settings(bases("llama"), other)
    with pytest.raises(Cancelled):
        run(chosen, tmp_path / "rows", Watcher(stop_at=2))
    other.write_text(chats.read_text())
    with pytest.raises(InputError, match="The rows have changed since this run was started"):
        run(chosen, tmp_path / "rows", Watcher(), resume=True)


def in_the_old_form(run_folder: Path) -> None:
    """Write the newest checkpoint as version 0.1 did, and leave no other."""
    place = existing(run_folder / "checkpoints")[-1]
    plain = json.loads((place / "state.json").read_text())
    old = place.with_name(f"checkpoint-{plain['step']}")
    place.rename(old)
    (old / "state.json").rename(old / "studio.json")
    parameters = {name.removeprefix("model."): value for name, value in load_file(old / "adapter.safetensors").items()}
    (old / "adapter.safetensors").unlink()
    plugins = torch.load(old / "plugins.pt", weights_only=True) if (old / "plugins.pt").is_file() else {}
    (old / "plugins.pt").unlink(missing_ok=True)
    torch.save({"parameters": parameters, "plugins": plugins}, old / "studio_state.pt")


def test_checkpoints_of_earlier_versions_are_taken_up(bases, chats, tmp_path):
    config = settings(bases("llama"), chats, steps=6, ema=True, perturb="ggpo", reg="ba")
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=3))
    in_the_old_form(tmp_path / "part")
    assert [place.name for place in existing(tmp_path / "part" / "checkpoints")] == ["checkpoint-3"]
    assert same(weights(whole), weights(run(config, tmp_path / "part", Watcher(), resume=True)))


def test_either_driver_turns_the_steps(bases, chats, tmp_path):
    """The accelerate loop and transformers' Trainer train the same task to the same adapter."""
    from studio.training.drivers import accelerate
    from studio.training.session import TrainSession
    from studio.training.tasks.language import task_for

    config = settings(bases("llama"), chats, steps=4, reg="ba", ema=True, validation_split=0.25)
    usual = run(config, tmp_path / "usual", first := Watcher())
    session = TrainSession.of(task_for(config), tmp_path / "loop", second := Watcher())
    other = accelerate.train(session)
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    one, two = weights(usual), weights(other)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one | two)
    measured = [made["validation"][-1]["validation_loss"] for made in (usual, other)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def test_a_stopped_run_is_kept(bases, chats, tmp_path):
    short = run(settings(bases("llama"), chats, steps=3, lr_schedule="constant", warmup_ratio=0), tmp_path / "short")
    config = settings(bases("llama"), chats, steps=6, lr_schedule="constant", warmup_ratio=0)
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=3))
    kept = run(config, tmp_path / "part", Watcher(), keep=True)
    assert kept["steps"] == 3
    assert same(weights(short), weights(kept))


def test_plugins_join_those_of_the_configuration(bases, chats, tmp_path):
    from adapters.plugin import Plugin

    class Noting(Plugin):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def after_step(self, step: int) -> None:
            self.steps.append(step)

    config = settings(bases("llama"), chats, steps=3, perturb="ggpo")
    alone = run(config, tmp_path / "alone", Watcher())
    joined = run(config, tmp_path / "joined", Watcher(), plugins=[noting := Noting()])
    assert same(weights(alone), weights(joined))
    assert noting.steps == [0, 1, 2]


PROGRAM = """
import sys
import torch
from pathlib import Path
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run
torch.set_num_threads(1)
run(TrainLanguageConfig.from_yaml(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_log_the_loss_of_both(bases, chats, tmp_path):
    alone = Watcher()
    run(settings(bases("llama"), chats, batch_size=4, optimizer="sgd"), tmp_path / "alone", alone)
    (tmp_path / "half.yaml").write_text(settings(bases("llama"), chats, batch_size=2, optimizer="sgd").to_yaml())
    (tmp_path / "program.py").write_text(PROGRAM)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "program.py"),
         str(tmp_path / "half.yaml"), str(tmp_path / "both")],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    rows = read_curve(tmp_path / "both" / "loss.csv")
    assert [float(row["loss"]) for row in rows] == pytest.approx(alone.losses, rel=1e-5)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(bases, chats, tmp_path, monkeypatch):
    from studio.training import checkpoint

    config = settings(bases("llama"), chats, steps=6, checkpoint_every=2)
    write = checkpoint.save_file

    def full(tensors, path):
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"step-000004' could not be written .*No space left"):
        run(config, tmp_path, Watcher())
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    assert run(config, tmp_path, Watcher(), resume=True)["steps"] == 6


def test_accumulated_batches_are_the_large_batch(bases, chats, tmp_path):
    """The loss is one mean over all learnt tokens of the step, however they are cut into passes."""
    large = run(settings(bases("llama"), chats, batch_size=8), tmp_path / "large", Watcher())
    small = run(settings(bases("llama"), chats, batch_size=2, gradient_accumulation=4), tmp_path / "small", Watcher())
    first, second = weights(large), weights(small)
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)


def test_the_adapter_is_what_stock_peft_loads(bases, chats, tmp_path):
    """On the untouched base, with the logits the training ended with."""
    config = settings(bases("llama"), chats, steps=8, validation_split=0.25, use_rslora=True, alpha=3.0,
                      rank_pattern={"q_proj": 4})  # fmt: skip
    result = run(config, tmp_path, Watcher())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")), result["adapter"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases("llama"))
    samples = samples_of(config, tokenizer).held_out
    total = count = 0.0
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(sample["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert total / count == pytest.approx(result["validation"][-1]["validation_loss"], rel=1e-5)
    assert result["validation"][-1]["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    described = json.loads((Path(result["adapter"]) / "adapter_config.json").read_text())
    assert (described["task_type"], described["base_model_name_or_path"]) == ("CAUSAL_LM", bases("llama").name)


def test_the_snippet_of_the_card_runs_as_printed(bases, chats, tmp_path, monkeypatch):
    result = run(settings(bases("llama"), chats, steps=1), tmp_path, Watcher())
    adapter = Path(result["adapter"])
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert card == Path(result["card"]).read_text(encoding="utf-8")
    values = yaml.safe_load(card.split("---\n")[1])
    assert values["library_name"] == "peft"
    assert "base_model" not in values
    assert str(bases("llama").parent) not in card
    (adapter / bases("llama").name).symlink_to(bases("llama"))  # where the reader has the base
    monkeypatch.chdir(adapter)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(code, "card", "exec"), found)
    assert isinstance(found["model"], PeftModel)


@pytest.mark.parametrize("method", [
    {"init": "lora_ga", "use_rslora": True}, {"init": "lora_sb"},
    {"perturb": "ggpo", "reg": "ba", "init": "pissa"}, {"freeze_a": True, "perturb": "mgpo"},
    {"grad_rule": "allora", "optimizer": "sgd", "reg": "ba"},
], ids=lambda values: "-".join(map(str, values.values())))  # fmt: skip
def test_methods_train_stop_resume_and_leave_an_ordinary_adapter(bases, chats, tmp_path, method):
    config = settings(
        bases("llama"), chats, steps=5, init_batches=2, validation_split=0.25, validation_every=5, **method
    )
    whole = run(config, tmp_path / "whole", Watcher())
    assert all(torch.tensor(float(row["loss"])).isfinite() for row in read_curve(tmp_path / "whole" / "loss.csv"))
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=2))
    assert same(weights(whole), weights(run(config, tmp_path / "part", Watcher(), resume=True)))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")), whole["adapter"]).eval()
    sample = samples_of(config, AutoTokenizer.from_pretrained(bases("llama"))).held_out
    loss = [model(input_ids=torch.tensor([s["input_ids"]]), labels=torch.tensor([s["labels"]])).loss for s in sample]
    counts = [sum(label != -100 for label in s["labels"][1:]) for s in sample]
    mean = sum(float(value) * count for value, count in zip(loss, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(whole["validation"][-1]["validation_loss"], rel=1e-4)


def test_the_base_is_never_changed(bases, chats, tmp_path):
    before = load_file(bases("llama") / "model.safetensors")
    run(settings(bases("llama"), chats, init="pissa"), tmp_path, Watcher())
    assert same(before, load_file(bases("llama") / "model.safetensors"))


def test_packed_rows_learn_what_single_ones_learn(bases, chats, tmp_path):
    """One step over all samples: packed and apart have the same loss and the same gradient."""
    apart = run(settings(bases("llama"), chats, steps=1, batch_size=12), tmp_path / "apart", watch := Watcher())
    config = settings(bases("llama"), chats, packing=True)
    packed_rows = len(samples_of(config, AutoTokenizer.from_pretrained(bases("llama"))).shown)
    assert packed_rows <= 6  # two or three of about thirty tokens in each row of 96
    packed = run(
        config.model_copy(update={"steps": 1, "batch_size": packed_rows}),
        tmp_path / "packed",
        watch_packed := Watcher(),
    )
    assert watch_packed.losses == pytest.approx(watch.losses, rel=1e-5)
    first, second = weights(apart), weights(packed)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_packing_is_refused_where_samples_would_mix(bases, chats):
    from pipelines.language.loading import open_model

    base = open_model(bases("llama"))
    config = settings(bases("llama"), chats, packing=True)
    samples = samples_of(config, base.tokenizer)
    base.model.config.use_cache = False
    check_packing(base, samples)
    plain = base.model.forward
    base.model.forward = lambda position_ids=None, **rest: plain(**rest)  # a model that ignores positions
    with pytest.raises(InputError, match="set packing to false"):
        check_packing(base, samples)


def test_classification(bases, tmp_path):
    """It learns which letter a text is made of; the head is saved with the adapter and stock PEFT gives the same."""
    rows = [{"text": letter * count, "label": letter} for letter in "xyz" for count in range(2, 6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = settings(bases("bert"), data, task="classification", steps=60, batch_size=12, learning_rate=2e-3, rank=4,
                      validation_data=str(data), validation_every=60, sample_prompts=["yyy"])  # fmt: skip
    result = run(config, tmp_path / "run", Watcher())
    assert result["labels"] == ["x", "y", "z"]
    last = result["validation"][-1]
    assert last["accuracy"] >= 0.9
    assert last["macro_f1"] >= 0.9
    base = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3)
    model = PeftModel.from_pretrained(base, result["adapter"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases("bert"))
    right = 0
    for row in rows:
        guess = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()
        right += "xyz"[guess] == row["label"]
    assert right / len(rows) == pytest.approx(last["accuracy"])
    assert '"answer": "y' in (tmp_path / "run" / "answers.jsonl").read_text()


def test_masked_language_model_resumes_exactly(bases, tmp_path):
    data = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"the number {n} is {'odd' if n % 2 else 'even'}"} for n in range(8)]
    )
    config = settings(bases("bert"), data, task="masked", steps=6, validation_split=0.25, validation_every=3,
                      dropout=0.1, sample_prompts=["the number 3 is o<mask>d"])  # fmt: skip
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled):
        run(config, tmp_path / "part", Watcher(stop_at=4))
    assert same(weights(whole), weights(run(config, tmp_path / "part", Watcher(), resume=True)))
    PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(bases("bert")), whole["adapter"])


def test_gpt2s_transposed_layers(bases, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)])
    result = run(
        settings(bases("gpt2"), data, validation_split=0.25, init="lora_ga", init_batches=2),
        tmp_path / "run",
        Watcher(),
    )
    base = AutoModelForCausalLM.from_pretrained(bases("gpt2"))
    tokenizer = AutoTokenizer.from_pretrained(bases("gpt2"))
    model = PeftModel.from_pretrained(base, result["adapter"]).eval()
    config = settings(bases("gpt2"), data, validation_split=0.25)
    batch = Collate(tokenizer.pad_token_id)(samples_of(config, tokenizer).held_out)
    assert float(model(**batch).loss) == pytest.approx(result["validation"][-1]["validation_loss"], rel=1e-4)


def test_continue_from_an_adapter(bases, chats, tmp_path):
    first = run(settings(bases("llama"), chats, steps=6), tmp_path / "first", Watcher())
    watcher = Watcher()
    again = settings(bases("llama"), chats, steps=1, continue_from=first["adapter"], learning_rate=1e-12)
    second = run(again, tmp_path / "second", watcher)
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(InputError, match=r"updates a weight of shape \(32, 64\), the model's is \(48, 96\)"):
        run(settings(bases("wide"), chats, continue_from=first["adapter"]), tmp_path / "third", Watcher())


@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_a_quantised_base_learns_by_every_kind_of_method(width, bases, chats, tmp_path):
    """QLoRA with a start from gradients, a disturbance and a regulariser: the base stays as it was quantised."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra bnb)")
    config = settings(bases("llama"), chats, quantization=width, init="lora_ga", init_batches=2, use_rslora=True,
                      perturb="mgpo", reg="ba", learning_rate=1e-2, steps=8)  # fmt: skip
    watcher = Watcher()
    made = weights(run(config, tmp_path / "run", watcher))
    assert watcher.losses[-1] < watcher.losses[0]
    assert all(bool(tensor.isfinite().all()) and tensor.is_floating_point() for tensor in made.values())


@pytest.mark.slow
@pytest.mark.parametrize("init", ["default", "pissa", "lora_ga"])
@pytest.mark.parametrize("rule", ["plain", "allora"])
@pytest.mark.parametrize("perturb", ["none", "ggpo", "mgpo"])
@pytest.mark.parametrize("reg", ["none", "ba"])
def test_the_matrix_of_methods(bases, chats, tmp_path, init, rule, perturb, reg):
    """Five steps of every combination: finite losses, and stock PEFT gives the logits of the trained model."""
    config = settings(bases("llama"), chats, init=init, grad_rule=rule, perturb=perturb, reg=reg, init_batches=2,
                      validation_split=0.25, validation_every=5)  # fmt: skip
    result = run(config, tmp_path, watcher := Watcher())
    assert all(torch.tensor(watcher.losses).isfinite())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")), result["adapter"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases("llama"))
    batch = Collate(tokenizer.pad_token_id)(samples_of(config, tokenizer).held_out)
    assert float(model(**batch).loss) == pytest.approx(result["validation"][-1]["validation_loss"], rel=1e-5)
