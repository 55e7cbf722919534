"""The student of a transfer: a LoRA, a DoRA or learnt tokens, trained on the written examples like any other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters import files
from adapters.generation.trans_lora import soft_loss
from adapters.plugin import Layers
from studio.datasets.encoding import IGNORED
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.causal import CausalTask
from studio.training.trainer_mixin import COMPONENT

Teacher = Callable[[Mapping[str, Tensor]], Tensor]


class StudentTask(CausalTask):
    """A causal training that says in its recipe where the rows come from.

    Args:
        told: that.
        virtual_tokens: learnt tokens before every sample (prompt tuning, arXiv 2104.08691) instead of a LoRA; 0 = LoRA.
        teacher: logits (batch, length, vocabulary) of a batch's inputs, which the student learns to have (soft labels)
            instead of the labels; None = the labels.
    """

    def __init__(
        self, asked: TrainLanguageConfig, told: dict[str, Any], virtual_tokens: int = 0, teacher: Teacher | None = None
    ) -> None:  # fmt: skip
        super().__init__(asked)
        self.told, self.virtual_tokens, self.teacher = told, virtual_tokens, teacher

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        base, data = super().facts()
        return base, {**data, "transfer": self.told}

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        made = self._with_tokens(models) if self.virtual_tokens else super().inject(models)
        if self.teacher is not None:
            self.learner.register_forward_hook(self._softened, with_kwargs=True)
        return made

    def _with_tokens(self, models: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`inject`, for learnt tokens."""
        from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

        # random vectors of unit size are far from any word of most models: begin with words
        self.learner = get_peft_model(models[COMPONENT], PromptTuningConfig(
            task_type=self.peft_type, num_virtual_tokens=self.virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        ))  # fmt: skip
        self.session.dtype = models[COMPONENT].dtype
        for parameter in self.learner.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.learner.register_forward_hook(self._of_the_sample)
        return {COMPONENT: self.learner}

    def _of_the_sample(self, model: Any, given: Any, outputs: Any) -> Any:
        """The outputs without those of the learnt tokens, as labels and measures have them."""
        outputs.logits = outputs.logits[:, self.virtual_tokens :]
        return outputs

    def _softened(self, model: Any, given: Any, inputs: dict[str, Any], outputs: Any) -> Any:
        """The outputs with the loss of soft labels in place of the labels'."""
        labels = inputs.get("labels")
        if labels is None or self.teacher is None:  # it is being measured
            return outputs
        asked: dict[str, Tensor] = {
            name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs
        }
        loss, count = soft_loss(outputs.logits, self.teacher(asked), labels), inputs.get("num_items_in_batch")
        # the trainer wants the sum over all batches of a step divided by the tokens of the step
        outputs.loss = loss if count is None else loss * (labels[:, 1:] != IGNORED).sum() / count
        return outputs

    def export(self, layers: Layers, folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, str]:
        if not self.virtual_tokens:
            return super().export(layers, folder, name, recipe)
        with self.session.best_weights(), files.whole(folder / name) as part:
            self.learner.save_pretrained(part)
            files.write_text(part / "README.md", self._card(recipe))
        return {"peft": str(folder / name)}
