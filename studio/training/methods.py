"""The methods of the core as plugins, for any driver: ``plugins_for(config)`` is what a configuration asks for.

They find adapted layers in the models the driver hands over and never change the base. What is trained at the end is
read with :func:`adapters.layers.variant.read_layers`, an ordinary LoRA whatever took part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.errors import InputError
from adapters.initialise import start
from adapters.initialise.start import Start
from adapters.inspection.intruders import Spectrum, find, spectrum
from adapters.layers.variant import (
    adapted,
    attach,
    base_weight,
    core_of,
    effective,
    offset_of,
    pair,
    set_core,
    set_offset_buffers,
)
from adapters.learn import ba_lora
from adapters.learn.allora import AlloraRule, ScaledSteps
from adapters.learn.ffa import freeze_a
from adapters.learn.ggpo import RowNoise
from adapters.learn.mgpo import MomentumBranch, momentum_of
from adapters.plugin import Answers, Handles, Need, Outputs, Plugin
from studio.training.schemas.combinations import refusal


def plugins_for(config: Any) -> list[Plugin]:
    """The plugins of a configuration with :class:`~studio.training.schemas.method.MethodFields`, not yet configured.

    Raises:
        InputError: a combination the table refuses.
    """
    refused = refusal(config)
    if refused:
        raise InputError(refused[0].upper() + refused[1:] + ".")
    chosen: list[Callable[[], Plugin]] = []
    if config.init not in start.PLAIN:
        chosen.append(StartPlugin)
    if config.freeze_a:
        chosen.append(FreezePlugin)
    if config.grad_rule == "allora":
        chosen.append(AlloraPlugin)
    if config.perturb != "none":
        chosen.append(PerturbationPlugin)
    if getattr(config, "reg", "none") == "ba":
        chosen.append(BiasPlugin)
    if config.intruders_every:
        chosen.append(IntruderPlugin)
    return [make() for make in chosen]


def layers_of(handles: Handles) -> dict[str, Any]:
    """Adapted PEFT layers as "component.module path" -> layer."""
    return {
        f"{component}.{name}": layer
        for component, model in handles.models.items()
        for name, layer in adapted(model, handles.adapter).items()
    }


class StartPlugin(Plugin):
    """Data-driven starts, offsets and LoRA-SB's core."""

    name = "start"

    def configure(self, config: Any) -> None:
        self.start = Start(
            name=config.init,
            batches=config.init_batches,
            gamma=config.ga_gamma,
            direction=config.ga_direction,
            size=config.ga_scale,
            norm_clip=config.ga_norm_clip,
            mode=config.corda_mode,
            eta=config.sb_step or 0.0,
            seed=config.seed,
        )

    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"}) if self.start.looks else frozenset()

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = layers_of(handles), handles.adapter
        if self.start.looks and handles.calibration is None:  # a run is taken up: what is missing comes with its state
            if self.start.name == "lora_sb":
                for layer in self.layers.values():
                    down, _ = pair(layer, self.adapter)
                    set_core(layer, torch.zeros(down.shape[0], down.shape[0]), self.adapter)
            return
        losses = None
        if handles.calibration is not None:
            losses = handles.calibration.losses
            if self.start.name == "lora_sb" and not self.start.eta:
                self.start = Start(**{**vars(self.start), "eta": handles.calibration.rate})
        start.apply(self.start, handles.models, losses, self.adapter)

    def after_inject(self, handles: Handles) -> None:
        cores = [core for layer in self.layers.values() if (core := core_of(layer, self.adapter)) is not None]
        _no_decay(handles, cores)  # it would pull towards W0, not towards the start

    def state_dict(self) -> dict[str, Any]:
        kept = {}
        for name, layer in self.layers.items():
            frozen = offset_of(layer, self.adapter)
            if core_of(layer, self.adapter) is not None:
                frozen = pair(layer, self.adapter)
            if frozen is not None:
                kept[name] = [tensor.detach().cpu().clone() for tensor in frozen]
        return {"init": self.start.name, "frozen": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("init") != self.start.name:
            raise InputError(
                f"The checkpoint was not started with '{self.start.name}': its frozen matrices are missing; start anew."
            )
        if self.start.name == "eva":
            return
        for name, layer in self.layers.items():
            if name not in state["frozen"]:
                raise InputError(f"The checkpoint has no start of the layer '{name}': start anew.")
            first, second = state["frozen"][name]
            if self.start.name == "lora_sb":
                with torch.no_grad():
                    down, up = pair(layer, self.adapter)
                    down.copy_(first)
                    up.copy_(second)
            else:
                set_offset_buffers(layer, first, second, self.adapter)


class FreezePlugin(Plugin):
    """FFA-LoRA: A is frozen."""

    name = "freeze"

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = layers_of(handles), handles.adapter
        for model in handles.models.values():
            freeze_a(model, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        return {name: pair(layer, self.adapter)[0].detach().cpu().clone() for name, layer in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                if name not in state:
                    raise InputError(f"The checkpoint has no frozen A of the layer '{name}': start anew.")
                pair(layer, self.adapter)[0].copy_(state[name])


class AlloraPlugin(Plugin):
    """ALLoRA's gradient rule, or its factors on the optimiser's steps."""

    name = "allora"

    def configure(self, config: Any) -> None:
        self.eta, self.mode = config.allora_eta, config.allora_mode

    def initialise(self, handles: Handles) -> None:
        self.layers, self.adapter = _matrices(handles), handles.adapter
        for name, layer in self.layers.items():
            if layer.scaling[self.adapter] != 1:
                raise InputError(
                    f"ALLoRA has no scaling factor, but '{name}' has alpha / r = {layer.scaling[self.adapter]:g}: "
                    "leave alpha empty."
                )
            if self.mode == "gradient":
                attach(layer, self.adapter).rule = AlloraRule(self.eta)

    def after_inject(self, handles: Handles) -> None:
        _check_whole(self.layers, self.adapter, "ALLoRA")
        _no_decay(handles, [pair(layer, self.adapter)[1] for layer in self.layers.values()])
        if self.mode == "lr":
            if handles.optimizer is None:
                raise InputError("allora_mode 'lr' scales an optimiser's steps, but there is none.")
            ScaledSteps(self.layers, self.eta, self.adapter).attach(handles.optimizer)


class PerturbationPlugin(Plugin):
    """GGPO, Flat-LoRA and MGPO: on from the step's begin until its gradients are in."""

    name = "perturbation"

    def configure(self, config: Any) -> None:
        self.kind, self.every, self.schedule = config.perturb, config.perturb_every, config.perturb_schedule
        self.sigma, self.mix = config.perturb_sigma, config.perturb_norm
        self.beta = 0.0 if self.kind == "flat" else config.perturb_beta
        self.rho, self.ema = config.perturb_rho, config.perturb_ema
        self.sign = -1.0 if config.perturb_direction == "downhill" else 1.0

    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients", "momenta"}) if self.kind == "mgpo" else frozenset({"gradients"})

    def after_inject(self, handles: Handles) -> None:
        self.layers, self.adapter, self.steps = _matrices(handles), handles.adapter, handles.steps
        _check_whole(self.layers, self.adapter, f"perturb '{self.kind}'")
        if self.schedule == "cosine" and self.steps < 1:
            raise InputError("perturb_schedule 'cosine' needs the number of steps: set it, or use 'constant'.")
        if self.kind == "mgpo":
            if handles.optimizer is None:
                raise InputError("mgpo follows an optimiser's momentum, but there is none: use perturb 'ggpo'.")
            self.momentum = momentum_of(handles.optimizer)
        self.active: dict[str, RowNoise | MomentumBranch] = {}
        for name, layer in self.layers.items():
            if self.kind == "mgpo":
                made: RowNoise | MomentumBranch = MomentumBranch(self.rho, self.ema, self.sign)
            else:
                made = RowNoise(layer, name, self.sigma, self.beta, self.mix, handles.seed)
            self.active[name] = attach(layer, self.adapter).perturbation = made

    def step_begin(self, step: int) -> None:
        if step % self.every:
            return
        strength = 1.0
        if self.schedule == "cosine":
            strength = (1 - math.cos(math.pi * min(1.0, step / self.steps))) / 2
        for name, layer in self.layers.items():
            disturbance = self.active[name]
            if isinstance(disturbance, MomentumBranch):
                disturbance.begin(layer, self.adapter, self.momentum)
            elif strength > 0:
                disturbance.begin(layer, self.adapter, step, strength)

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        ks = [d.adaptive for d in self.active.values() if isinstance(d, MomentumBranch)]
        return loss, {"mgpo_k": sum(ks) / len(ks)} if ks else {}

    def grads_ready(self, step: int) -> None:
        for name, layer in self.layers.items():
            self.active[name].end(layer, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, disturbance in self.active.items():
            value = disturbance.mean_norm if isinstance(disturbance, MomentumBranch) else disturbance.gradient
            kept[name] = value.cpu() if isinstance(value, Tensor) else value
        return {"kind": self.kind, "layers": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("kind") != self.kind:
            raise InputError(f"The checkpoint was made with perturb '{state.get('kind', 'none')}', not '{self.kind}'.")
        for name, disturbance in self.active.items():
            value = state["layers"].get(name)
            if isinstance(disturbance, MomentumBranch):
                disturbance.mean_norm = value
            else:
                disturbance.gradient = value


class BiasPlugin(Plugin):
    """BA-LoRA's three terms on the logits."""

    name = "ba"

    def configure(self, config: Any) -> None:
        self.config, self.step, self.total, self.seed = config, 0, 0, int(getattr(config, "seed", 0))
        self._warned: set[str] = set()

    def needs(self) -> frozenset[Need]:
        return frozenset({"logits", "reference"})

    def after_inject(self, handles: Handles) -> None:
        self.total = handles.steps
        if self.config.ba_schedule == "paper" and self.config.ba_version == "2026":
            ba_lora.weights_at(ba_lora.PAPER["nlg"], 0, self.total)  # refuses an unknown number of steps now

    def step_begin(self, step: int) -> None:
        self.step = step

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        if not isinstance(outputs, Answers):
            raise InputError("BA-LoRA needs a model with logits; for pictures use prior_preservation instead.")
        config, logits = self.config, outputs.logits
        task = ("nlg" if logits.ndim == 3 else "nlu") if config.ba_task == "auto" else config.ba_task
        if task == "nlu" and logits.ndim != 2:
            raise InputError("BA-LoRA for classification needs one row of logits per sample: set ba_task to 'nlg'.")
        terms = self._terms(task, outputs)
        logs: dict[str, float] = {}
        for name, (weight, value) in terms.items():
            loss = loss + outputs.share * weight * value
            logs[f"ba_{name}"] = measured = float(value.detach())
            logs[f"ba_{name}_weighted"] = weight * measured
        return loss, logs

    def _weights(self, task: str) -> ba_lora.Weights:
        config = self.config
        first = config.ba_version == "2024"
        base = ba_lora.FIRST_CODE if first else ba_lora.PAPER[task]
        chosen = ba_lora.Weights(
            base.l1 if config.ba_l1 is None else config.ba_l1,
            base.l2 if config.ba_l2 is None else config.ba_l2,
            base.l3 if config.ba_l3 is None else config.ba_l3,
            config.ba_k or base.k,
        )
        return ba_lora.weights_at(chosen, self.step, self.total, "constant" if first else config.ba_schedule)

    def _terms(self, task: str, outputs: Answers) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, value) of the terms with a weight."""
        config, weights, first = self.config, self._weights(task), self.config.ba_version == "2024"
        mask: Any = ...
        if task == "nlg":
            mask = ba_lora.valid_rows(outputs.labels, outputs.shifted)
            if not bool(mask.any()):
                self._warn("a batch has no valid tokens: BA-LoRA skips it")
                return {}
        rows = outputs.logits[mask]
        found: dict[str, tuple[float, Tensor]] = {}
        if weights.l1 > 0:
            teacher = outputs.reference()
            if teacher.shape != outputs.logits.shape:
                raise InputError("The base gives other logits than the model in training: same vocabulary needed.")
            value = (
                ba_lora.consistency_2024(outputs.logits, teacher, task)
                if first
                else ba_lora.consistency(rows, teacher[mask], config.ba_temp)
            )
            found["consistency"] = weights.l1, value
        if weights.l2 > 0 and task == "nlu" and rows.shape[0] < 2:
            self._warn("a batch of one sample has no covariance: BA-LoRA's diversity term skips it")
        elif weights.l2 > 0:
            if first:
                value = ba_lora.diversity_2024(outputs.logits if task == "nlg" else rows, task)
            elif task == "nlu":
                value = ba_lora.diversity_covariance(rows)
            else:
                value = ba_lora.diversity_topk(rows, config.ba_topk)
            found["diversity"] = weights.l2, value
        if weights.l3 > 0:
            if weights.k > min(rows.shape):
                self._warn(f"ba_k {weights.k} is cut to the {min(rows.shape)} singular values there are")
            kind = config.ba_norm
            if kind == "auto":
                kind = "nuclear" if task == "nlu" or first else "frobenius"
            found["spectral"] = weights.l3, ba_lora.spectral(rows, weights.k, kind, self.seed + self.step)
        return found

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)


class IntruderPlugin(Plugin):
    """Counts intruder dimensions now and then; the number is in the logs of the steps after."""

    name = "intruders"

    def configure(self, config: Any) -> None:
        self.every = config.intruders_every
        self.logs: dict[str, float] = {}

    def after_inject(self, handles: Handles) -> None:
        self.layers, self.adapter = _matrices(handles), handles.adapter
        self.bases: dict[str, Spectrum] = {}

    def after_step(self, step: int) -> None:
        if (step + 1) % self.every:
            return
        total = 0
        for name, layer in self.layers.items():
            W0 = base_weight(layer).cpu()
            if name not in self.bases:
                self.bases[name] = spectrum(W0)
            left, right = (tensor.cpu() for tensor in effective(layer, self.adapter))
            k = min(10, *W0.shape)
            total += len(find(W0, layer.scaling[self.adapter] * left, right, k, base=self.bases[name]).intruders)
        self.logs = {"intruders": float(total)}

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        return loss, self.logs


def _matrices(handles: Handles) -> dict[str, Any]:
    """Adapted linear layers and convolutions (adapters of embeddings stay plain)."""
    found = {name: layer for name, layer in layers_of(handles).items() if handles.adapter in layer.lora_A}
    if not found:
        raise InputError("The models have no adapter layers that learn by this method.")
    return found


def _check_whole(layers: Mapping[str, Any], adapter: str, method: str) -> None:
    """Refuse parameters that are split over processes: row norms of a piece mean nothing."""
    for layer in layers.values():
        for parameter in pair(layer, adapter):
            if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or parameter.ndim < 2:
                raise InputError(
                    f"{method} needs whole matrices, but this launch splits parameters over processes "
                    "(FSDP or ZeRO-3): use DDP or ZeRO-2."
                )


def _no_decay(handles: Handles, parameters: list[Tensor]) -> None:
    """No weight decay in the optimiser's groups that hold nothing but these."""
    if handles.optimizer is None or not parameters:
        return
    chosen = {id(parameter) for parameter in parameters}
    for group in handles.optimizer.param_groups:
        if group["params"] and all(id(parameter) in chosen for parameter in group["params"]):
            group["weight_decay"] = 0.0


__all__ = [
    "AlloraPlugin",
    "BiasPlugin",
    "FreezePlugin",
    "IntruderPlugin",
    "PerturbationPlugin",
    "StartPlugin",
    "layers_of",
    "plugins_for",
]
