"""The auxiliary loss inside transformers' ``Trainer`` and what derives from it.

    class Mine(MoeTrainerMixin, SFTTrainer): ...

A trainer that cannot be subclassed gets the loss from the model's output instead (``attach_aux_to_output``); with
gradient accumulation such a trainer divides nothing, so the coefficient then counts once per forward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapters.layers.experts.losses import aux_loss
from adapters.layers.experts.routing import TYPES_COLUMN


class MoeTrainerMixin:
    """Adds the auxiliary loss to a trainer's loss while training; put it before the trainer's class."""

    # what the trainer gives
    accelerator: Any
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        """The trainer's loss plus the auxiliary loss, divided as the trainer divides its own.

        It is added after the trainer's own scaling over processes, which must not reach it.
        """
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **options
        )
        if model.training:
            own: Any = self.accelerator.unwrap_model(model)
            loss = loss + self._share(aux_loss(own), num_items_in_batch).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _share(self, aux: Tensor, items: Any) -> Tensor:
        """A pass's share of the auxiliary loss: the trainer divides it itself unless its loss is already scaled."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepts = bool(getattr(self, "model_accepts_loss_kwargs", False))
            scaled = (accepts and items is not None) or self.compute_loss_func is not None
        return aux / self.current_gradient_accumulation_steps if scaled else aux

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the samples' types, which the model's signature does not name."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = [*columns, *([] if TYPES_COLUMN in columns else [TYPES_COLUMN])]
