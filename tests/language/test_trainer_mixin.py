"""The mixin in front of other trainers: TRL's SFTTrainer and Seq2SeqTrainer, with a plugin that watches."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from adapters.plugin import Plugin
from studio.training.drivers.trainer import SampleSet
from studio.training.language.data import Collate
from studio.training.trainer_mixin import StudioTrainerMixin


class Watching(Plugin):
    """Remembers the calls and what it saw; changes nothing."""

    name = "watching"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.shares: list[float] = []
        self.inside = False
        self.reference: torch.Tensor | None = None

    def initialise(self, handles):
        self.calls.append("initialise")

    def after_inject(self, handles):
        self.parameters = [p for model in handles.models.values() for p in model.parameters() if p.requires_grad]
        self.calls.append("after_inject")

    def step_begin(self, step):
        self.calls.append(f"begin {step}")

    @contextmanager
    def forward_context(self):
        self.calls.append("forward")
        yield

    def loss(self, loss, outputs):
        self.calls.append("loss")
        self.shares.append(outputs.share)
        self.reference, self.logits, self.shifted = outputs.reference(), outputs.logits.detach(), outputs.shifted
        return loss, {"watched": 1.0}

    def grads_ready(self, step):
        self.norm = sum(float(p.grad.square().sum()) for p in self.parameters if p.grad is not None) ** 0.5
        self.calls.append("ready")

    def after_step(self, step):
        self.calls.append("after")


STEP = ["forward", "loss", "forward", "loss", "ready", "after"]


def little_llama(bases):
    model = AutoModelForCausalLM.from_pretrained(bases("llama")).requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def arguments(kind, place, **more):
    return kind(
        output_dir=str(place), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip


def test_order_of_calls_shares_and_the_reference(bases, tmp_path):
    class Mine(StudioTrainerMixin, Trainer):
        pass

    model, plugin = little_llama(bases), Watching()
    samples = [{"input_ids": list(range(10, 10 + n)), "labels": list(range(10, 10 + n))} for n in (4, 6, 9, 12)]
    trainer = Mine(model=model, args=arguments(TrainingArguments, tmp_path, max_grad_norm=1e-3), plugins=[plugin],
                   train_dataset=SampleSet(samples), data_collator=Collate(0))  # fmt: skip
    trainer.train()
    assert plugin.calls == ["initialise", "after_inject", "begin 0", *STEP, "begin 1", *STEP]
    assert sum(plugin.shares[:2]) == pytest.approx(1)  # the parts of one step
    assert plugin.norm > 1e-3  # gradients are seen before clipping
    assert plugin.shifted
    base = AutoModelForCausalLM.from_pretrained(bases("llama")).eval()
    plain = trainer.model.get_base_model()
    assert plugin.reference.shape == plugin.logits.shape
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(plain.eval()(input_ids=ids).logits, base(input_ids=ids).logits)


def test_in_front_of_trls_sft_trainer(bases, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'adapter-studio[language]'")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class Mine(StudioTrainerMixin, trl.SFTTrainer):
        pass

    plugin = Watching()
    rows = datasets.Dataset.from_list([{"prompt": f"say {n}", "completion": str(n)} for n in range(8)])
    trainer = Mine(model=little_llama(bases), args=arguments(trl.SFTConfig, tmp_path, max_length=64), plugins=[plugin],
                   train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(bases("llama")))  # fmt: skip
    trainer.train()
    assert plugin.calls == ["initialise", "after_inject", "begin 0", *STEP, "begin 1", *STEP]
    assert sum(plugin.shares[:2]) == pytest.approx(1, abs=1e-6)


def test_in_front_of_the_seq2seq_trainer(tmp_path):
    class Mine(StudioTrainerMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=2, target_modules=["q", "v"],
                                                                          task_type="SEQ_2_SEQ_LM"))  # fmt: skip
    samples = [{"input_ids": [5, 6, 7], "labels": list(range(8, 8 + n))} for n in (2, 3, 4, 5)]

    def collate(rows):
        longest = max(len(row["labels"]) for row in rows)
        labels = torch.tensor([[*row["labels"], *[-100] * (longest - len(row["labels"]))] for row in rows])
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows]), "labels": labels}

    plugin = Watching()
    Mine(model=model, args=arguments(Seq2SeqTrainingArguments, tmp_path), plugins=[plugin],
         train_dataset=SampleSet(samples), data_collator=collate).train()  # fmt: skip
    assert plugin.calls == ["initialise", "after_inject", "begin 0", *STEP, "begin 1", *STEP]
    assert not plugin.shifted
