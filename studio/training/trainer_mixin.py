"""The second driver: training methods inside transformers' ``Trainer``, ``Seq2SeqTrainer`` or TRL's ``SFTTrainer``.

    class Mine(StudioTrainerMixin, SFTTrainer): ...
    Mine(model=peft_model, args=..., plugins=[...], seed_plugins=0).train()

Callbacks are not enough: they come after clipping and cannot change the loss. So the mixin comes before the trainer in
the order of inheritance and overrides the training step (a step begins; gradients are ready), the loss, the optimiser
and the contents of a checkpoint. The model must already have its adapter (``peft.get_peft_model``).

Plugin losses follow the Trainer's rule of normalisation: where it divides by ``num_items_in_batch``, the plugins get
the share of this forward pass; where it divides by the accumulation steps, the share is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from adapters import files
from adapters.errors import InputError
from adapters.layers.variant import untouched
from adapters.plugin import Answers, Calibration, Closure, Handles, Plugin, Plugins
from studio.datasets.seeds import global_seed
from studio.training.checkpoint import take_parameters

COMPONENT = "model"
STATE = "studio_state.pt"

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class StudioTrainerMixin:
    """Brings the plugin protocol of :mod:`adapters.plugin` to a trainer class; put it before that class.

    Args:
        plugins: the training methods, already configured.
        optimizer_of: makes the optimiser for a model; default: the trainer's own.
        first_rate: learning rate of the first step, which some starts need.
        adapter: name of the adapter in the PEFT model.
    """

    # what the trainer gives
    model: Any
    accelerator: Any
    args: Any
    state: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        plugins: Sequence[Plugin] | Plugins = (),
        optimizer_of: MakeOptimizer | None = None,
        first_rate: float = 0.0,
        adapter: str = "default",
        **options: Any,
    ) -> None:
        self.plugins = plugins if isinstance(plugins, Plugins) else Plugins(plugins)
        self.optimizer_of = optimizer_of
        self.first_rate = first_rate
        self.adapter_name = adapter
        self.step_logs: dict[str, float] = {}
        self.step_loss = self.last_norm = self.used_rate = 0.0
        self._passes = 0
        self._resumed: dict[str, Any] | None = None
        super().__init__(*args, **options)
        self.add_callback(_AfterStep(self))  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- before the first step
    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """As the trainer's, after the plugins have initialised the adapter."""
        self.start_methods(resumed=bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)  # type: ignore[misc]

    def start_methods(self, resumed: bool) -> None:
        """Let the plugins initialise the adapter; unless the run is resumed, with batches to measure."""
        calibration = None
        if "calibration" in self.plugins.needs() and not resumed:
            calibration = Calibration(self._calibration_losses, self.first_rate)
        self.plugins.initialise(self._handles(calibration=calibration))

    def _handles(self, **more: Any) -> Handles:
        return Handles(
            {COMPONENT: self.model}, steps=max(0, int(self.args.max_steps)), seed=int(self.args.seed),
            adapter=self.adapter_name, **more,
        )  # fmt: skip

    def _calibration_losses(self, count: int) -> Iterator[Closure]:
        """The mean loss of the first ``count`` batches, one closure each."""
        with global_seed(int(self.args.seed), "calibration"):
            loader = self.get_train_dataloader()  # type: ignore[attr-defined]
            for number, batch in enumerate(loader):
                if number == count:
                    break
                yield self._closure(self.calibration_batch(batch, number))
        self.accelerator.free_memory()

    def calibration_batch(self, batch: Any, number: int) -> Any:
        """A batch in the form for the loss; for trainers that change it."""
        return batch

    def _closure(self, batch: Any) -> Closure:
        def loss() -> torch.Tensor:
            inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
            with self.accelerator.autocast():
                outputs = self.model(**inputs)
            found: torch.Tensor = outputs["loss"]
            return found

        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser; a resumed run's parameters and plugin states are loaded now, when all of them exist."""
        if self.optimizer is None and self.optimizer_of is not None:
            self.optimizer = self.optimizer_of(self.model)
        super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
        self.plugins.after_inject(self._handles(optimizer=self.optimizer))
        if self._resumed is not None:
            self.plugins.load_state_dict(self._resumed["plugins"])
            own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            take_parameters(own, self._resumed["parameters"])
            self._resumed = None
        made: torch.optim.Optimizer = self.optimizer
        return made

    # ---------------------------------------------------------------- one step
    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        """One forward and backward pass; random numbers depend on the step, so that a resumed run draws the same."""
        step = int(self.state.global_step)
        if self._passes == 0:
            self.step_logs, self.step_loss = {}, 0.0
            self.plugins.step_begin(step)
        stream = f"dropout-{self.accelerator.process_index}"
        with global_seed(int(self.args.seed), stream, step * self.args.gradient_accumulation_steps + self._passes):
            loss = self.one_pass(model, inputs, *args, **options)
        self.step_loss += float(loss)
        self._passes += 1
        if self.accelerator.sync_gradients:
            self._passes = 0
            if not math.isfinite(self.step_loss):
                raise InputError(
                    f"The loss is not finite at step {step + 1}: lower learning_rate, or compute in bf16 or fp32. "
                    "What was saved before is kept."
                )
            self.accelerator.unscale_gradients()
            self.plugins.grads_ready(step)
        return loss

    def one_pass(self, model: Any, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        """The trainer's own forward and backward pass; for trainers that share it with others."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **options)  # type: ignore[misc]
        return loss

    def mean_loss(self) -> float:
        """The loss of the step that just ended, averaged over the processes; all of them must call this."""
        if self.accelerator.num_processes == 1:
            return self.step_loss
        found = self.accelerator.reduce(torch.tensor(self.step_loss, device=self.accelerator.device), "mean")
        return float(found)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.scaler is not None:  # unscaled already, which may be done only once
            return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.accelerator.scaler is not None:
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        found = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self.last_norm = float(found or 0.0)
        self.used_rate = float(self.optimizer.param_groups[0]["lr"])
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        """The trainer's loss, changed by the plugins while training."""
        learning = bool(model.training) and bool(self.plugins.plugins)
        labels = inputs.get("labels") if learning else None
        given = dict(inputs) if learning else {}  # with the labels, from which encoder-decoders make their input
        with self.plugins.forward_context() if learning else nullcontext():
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **options
            )
        if learning and labels is not None:
            answers = Answers(
                logits=_logits(outputs), labels=labels, reference=lambda: self._reference(model, given),
                share=self._share(labels, num_items_in_batch), shifted=self._shifted,
            )  # fmt: skip
            loss, logs = self.plugins.loss(loss, answers)
            self.step_logs |= logs
        return (loss, outputs) if return_outputs else loss

    @property
    def _shifted(self) -> bool:
        return bool(getattr(self, "_loss_shifts_labels", False))

    def _share(self, labels: torch.Tensor, total: Any) -> float:
        """Valid labels of this pass over those of the step, when the trainer normalises by them; else 1."""
        accepts = getattr(self, "model_accepts_loss_kwargs", False)
        if total is None or not accepts:
            return 1.0
        counted = labels[..., 1:] if self._shifted else labels
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return float((counted != -100).sum()) / max(1.0, float(torch.as_tensor(total).sum())) * processes

    def _reference(self, model: Any, inputs: Any) -> torch.Tensor:
        """Logits of the untouched base, without gradients."""
        with torch.no_grad(), untouched(self.accelerator.unwrap_model(model)):
            return _logits(model(**inputs)).detach()

    # ---------------------------------------------------------------- checkpoints
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trainer's files, and beside them every learning parameter and the plugins' state."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        place = Path(output_dir or self.args.output_dir)
        state = {"parameters": self._learning(), "plugins": self.plugins.state_dict()}
        files.write(place / STATE, lambda part: torch.save(state, part))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint) / STATE
        if not place.is_file():
            raise InputError(f"The checkpoint '{resume_from_checkpoint}' has no {STATE}: it is not this trainer's.")
        try:
            self._resumed = torch.load(place, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"The checkpoint '{resume_from_checkpoint}' is damaged ({error}).") from None

    def _learning(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


class _AfterStep(TrainerCallback):
    """Tells the plugins that the optimiser has stepped."""

    def __init__(self, trainer: StudioTrainerMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.trainer.plugins.after_step(int(state.global_step))


def _logits(outputs: Any) -> torch.Tensor:
    found = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if found is None:
        raise InputError("This training method needs the model's logits, but the loss gives none (a fused loss?).")
    return torch.as_tensor(found)
