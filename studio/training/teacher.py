"""The guided teacher: the base (with its styles) in two passes, with the student's adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from adapters.errors import InputError
from adapters.formats import read
from adapters.formats.fit import fit
from adapters.layers.gated import Adapter, GatedAdapters
from pipelines.diffusion.distillation.consistency import DiffusionPath, FlowPath, Path
from pipelines.diffusion.distillation.guidance import guided, within
from pipelines.diffusion.distillation.student import Student, first_not_finite
from pipelines.diffusion.families.base import joined
from studio.training.families import Family, Tensors
from studio.training.objective import Diffusion, FlowMatching
from studio.training.schemas.distill import DistillConfig, style


def path_of(family: Family, knots: int) -> Path:
    """The family's sampling path with ``knots`` knots.

    Raises:
        InputError: more knots than the noise schedule has, or an epsilon model with no signal left at its last level.
    """
    process: Any = family.process
    if isinstance(process, FlowMatching):
        return FlowPath(process.default_shift, knots)
    path = DiffusionPath(process.alphas_cumprod, process.prediction, knots)
    if process.prediction == "epsilon" and not bool(process.alphas_cumprod[path.start()[-1]] > 0):
        raise InputError(
            "The base predicts epsilon and its last noise level has no signal left (zero terminal SNR), where its path "
            "is undefined: distil with states 'data' and objective 'guidance', or a base that predicts v."
        )
    return path


@contextmanager
def styles_attached(config: DistillConfig, family: Family, device: torch.device) -> Iterator[None]:
    """Inside, the styles act on the base, in teacher and student alike.

    Raises:
        InputError: one is missing, or does not fit the base.
    """
    from studio import library

    models = {family.denoiser_name: family.denoiser, **family.encoder_parts}
    chosen = [style(text) for text in config.styles]
    files = [fit(read(library.resolve_adapter(name)), models, config.base, tables=False) for name, _ in chosen]
    with ExitStack() as attached:
        for component, model in models.items():
            parts = [
                Adapter(file.parts.get(component, {}), strength=weight)
                for file, (_, weight) in zip(files, chosen, strict=True)
            ]
            if any(part.layers for part in parts):
                engine = GatedAdapters(model, parts, device, model.dtype)
                attached.enter_context(engine.attached()).joint([1.0] * len(parts))
        yield


class Teacher:
    """The student's targets.

    Args:
        family: of the base; its denoiser is shared with the student.
        config: guidance, rescale and interval.
        null: conditioning (batch 1) of the null prompt.
        student: the adapter's switch, once there is one.
    """

    def __init__(self, family: Family, config: DistillConfig, null: Tensors, student: Student | None = None) -> None:
        self.family, self.config, self.null, self.student = family, config, null, student

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, times: torch.Tensor, given: Tensors, w: torch.Tensor) -> torch.Tensor:
        """The guided prediction in fp32, both halves in one batch.

        Args:
            noisy: states (batch, ...) in the base's precision.
            times: their levels (batch,).
            given: conditioning of the prompts.
            w: guidance (batch,).

        Raises:
            InputError: values that are not finite; names the level.
        """
        config = self.config
        null = {name: value.to(noisy.device).expand(len(noisy), *value.shape[1:]) for name, value in self.null.items()}
        both = {
            name: joined([null.get(name, value).to(value), value])
            for name, value in given.items()
            if name != "guidance"
        }
        with self.student.off() if self.student is not None else nullcontext():
            predicted = self.family.predict(
                self.family.denoiser, torch.cat([noisy, noisy]), torch.cat([times, times]), both
            )
        without, with_prompt = predicted.float().chunk(2)
        w = within(w.to(noisy.device), self.level(times), config.guidance_from, config.guidance_to)
        target = guided(without, with_prompt, w, config.guidance_rescale)
        bad = first_not_finite(target)
        if bad is not None:
            raise InputError(
                f"The teacher's prediction is not finite at noise level {float(times[bad]):g} with guidance "
                f"{float(w[bad]):g}: compute in bf16 or fp32, or lower guidance."
            )
        return target

    def level(self, times: torch.Tensor) -> torch.Tensor:
        """Noise levels in [0, 1] of the family's own levels."""
        process = self.family.process
        return times / len(process.alphas_cumprod) if isinstance(process, Diffusion) else times.float()
