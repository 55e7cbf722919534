"""X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models, arXiv 2402.07148.

Adapters that exist already, of any rank and kind, are frozen; a small classifier reads the base's last hidden state of
each token and gives every expert a gate, for the whole model or for each adapted module. Only the classifier learns.

    model = add(base, [expert("law", law), expert("code", code)], ClassifierOptions(depth=2, layerwise=True))
    model(input_ids)            # the base's own pass, then the pass with gated experts

An adapter's directory is complete: the experts' matrices are in it, and the configuration names where each came from,
with its SHA-256, in the order of the gates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.formats.mixture import different_bases
from adapters.formats.xlora import NamedExpert, XLoraFile, check_outputs
from adapters.layers.experts.classifier import Classifier, ClassifierOptions
from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.frozen import FrozenExperts
from adapters.layers.experts.layer import plain_weight_rows
from adapters.layers.experts.model import expert_layers
from adapters.layers.experts.passes import GatesFromBase, width_of
from adapters.layers.experts.places import originals
from adapters.layers.experts.routing import routing_of
from adapters.layers.sizes import is_linear, sizes

ADAPTER = "default"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Expert:
    """One frozen expert.

    Attributes:
        name: its name in this X-LoRA.
        layers: module path of the model -> layer.
        path, sha256: where it came from; empty if from nowhere.
        base: the base that its file names, or empty.
    """

    name: str
    layers: Mapping[str, LoraLayer]
    path: str = ""
    sha256: str = ""
    base: str = ""


def expert(name: str, file: LoraFile) -> Expert:
    """The expert made of an adapter that was fitted to the model (:func:`adapters.formats.fit.fit`).

    Raises:
        InputError: it adapts several models.
    """
    if len(file.parts) != 1:
        raise InputError(
            f"The expert '{name}' adapts {', '.join(file.parts)}: X-LoRA mixes experts of one language model."
        )
    (layers,) = file.parts.values()
    base = file.config.get("base_model_name_or_path")
    return Expert(name, layers, str(file.path or ""), file.sha256, base if isinstance(base, str) else "")


def add(
    model: Any, experts: Sequence[Expert], options: ClassifierOptions | None = None, adapter: str = ADAPTER, **more: Any
) -> PeftModel:
    """``model`` (which is changed) as a PEFT model with an X-LoRA of ``experts``.

    Args:
        options: of the classifier.
        more: further fields of the configuration (``task_type``, ``trained="both"`` to train the experts too).

    Raises:
        InputError: no expert, names used twice, experts that do not fit the model, or options that do not work.
    """
    config = config_for(model, experts, options, **more)
    wrapped = get_peft_model(model, config, adapter_name=adapter)
    fill(wrapped, experts, adapter)
    return wrapped


def config_for(
    model: Any, experts: Sequence[Expert], options: ClassifierOptions | None = None, **more: Any
) -> MoeConfig:
    """The configuration of an X-LoRA of ``experts`` on ``model``.

    Raises:
        InputError: as :func:`add`.
    """
    options = options or ClassifierOptions()
    if not experts:
        raise InputError("X-LoRA mixes experts that are trained already: name at least one.")
    modules = originals(model)
    for one in experts:
        _check_fits(one, modules)
    _warn_bases(experts)
    named = {name for one in experts for name in one.layers}
    frozen = [
        {
            "module": name,
            "ranks": [one.layers[name].rank if name in one.layers else 0 for one in experts],
            "dora": any(name in one.layers and one.layers[name].magnitude is not None for one in experts),
        }
        for name in modules
        if name in named
    ]
    width = width_of(model)
    if options.width not in (None, width):
        raise InputError(
            f"The classifier was given a width of {options.width}, but the model's hidden states have {width}."
        )
    if more.get("trained", "router") == "both" and any(entry["dora"] for entry in frozen):
        raise InputError("DoRA experts stay frozen in an X-LoRA: leave trained at 'router', or use ordinary LoRAs.")
    return MoeConfig(
        **{
            "target_modules": [entry["module"] for entry in frozen], "num_experts": len(experts),
            "attention": "experts", "r": max(layer.rank for one in experts for layer in one.layers.values()),
            "router": "external", "gate": "probability", "trained": "router", "preset": "x-lora", "frozen": frozen,
            "experts": [{"name": one.name, "path": one.path, "sha256": one.sha256} for one in experts],
            "classifier": replace(options, width=width).plain(), **more,
        }
    )  # fmt: skip


def _check_fits(one: Expert, modules: Mapping[str, nn.Module]) -> None:
    """Refuse an expert with a module that the model lacks, or of another size."""
    if not one.layers:
        raise InputError(f"The expert '{one.name}' has no LoRA layers.")
    for name, layer in one.layers.items():
        module = modules.get(name)
        if module is None:
            raise FamilyError(
                f"The expert '{one.name}' adapts '{name}', which this base lacks: it is for another base."
            )
        if layer.embedding or not is_linear(module):
            raise InputError(
                f"The expert '{one.name}' changes '{name}', a {type(module).__name__}: X-LoRA mixes experts beside "
                "linear layers only."
            )
        found = (layer.B.shape[0], layer.A.shape[1])
        if layer.A.ndim != 2 or found != sizes(module):
            raise FamilyError(
                f"The expert '{one.name}' is for a matrix {found} in '{name}', but this base has {sizes(module)} there."
            )


def _warn_bases(experts: Sequence[Expert]) -> None:
    if told := different_bases({one.name: one.base for one in experts}):
        _log.warning("%s", told)


@torch.no_grad()
def fill(model: Any, experts: Sequence[Expert], adapter: str = ADAPTER) -> None:
    """Put the experts' matrices into the model's layers."""
    for name, layer in _layers(model, adapter).items():
        owned = [one.layers.get(name) for one in experts]
        present = [found for found in owned if found is not None]
        rows = [None if found is None else dora_rows(layer, found) for found in owned]
        A, B = layer.factors(adapter).A, layer.factors(adapter).B
        A.copy_(torch.cat([found.A.float() for found in present]))
        parts = [
            found.B.float() * found.scale * (1.0 if row is None else (1 + row)[:, None])
            for found, row in zip(owned, rows, strict=True)
            if found is not None
        ]
        B.copy_(torch.cat([part.to(B.device) for part in parts], dim=1))
        if adapter in layer.moeadapter_rows:
            kept = layer.moeadapter_rows[adapter]
            kept.copy_(torch.stack([torch.zeros_like(kept[0]) if row is None else row.to(kept) for row in rows]))


def dora_rows(layer: FrozenExperts, found: LoraLayer) -> Tensor | None:
    """d = m / |W0 + s B A| - 1 of a DoRA expert: (out,) in fp32; None for others."""
    if found.magnitude is None:
        return None
    weight = plain_weight_rows(layer.get_base_layer()).cpu()
    total = weight + found.delta().cpu().to(weight)
    return (found.magnitude.cpu().to(weight) / torch.linalg.vector_norm(total, dim=1) - 1).float()


def _layers(model: nn.Module, adapter: str) -> dict[str, FrozenExperts]:
    """Path -> layer of an X-LoRA, in the order of its gates.

    Raises:
        InputError: there is none of this name.
    """
    found = {
        path: layer
        for path, layer in expert_layers(model).items()
        if isinstance(layer, FrozenExperts) and adapter in layer.places
    }
    if not found:
        raise InputError(f"The model has no X-LoRA named '{adapter}'.")
    return dict(sorted(found.items(), key=lambda item: item[1].places[adapter].position))


def classifier(model: nn.Module, adapter: str = ADAPTER) -> Classifier:
    """The classifier of an X-LoRA."""
    first = next(iter(_layers(model, adapter).values()))
    return cast(Classifier, first.moeadapter_router[adapter])


def names(model: nn.Module, adapter: str = ADAPTER) -> list[str]:
    """The experts' names in the order of their gates."""
    settings = next(iter(_layers(model, adapter).values())).settings[adapter]
    return [str(one["name"]) for one in settings.experts]


def _source(model: nn.Module) -> GatesFromBase:
    found = routing_of(model).source
    assert isinstance(found, GatesFromBase)
    return found


# ------------------------------------------------------------------------------------------------ gates


def last_gates(model: nn.Module) -> Tensor | None:
    """The gates of the last forward pass: (batch, length, N), layer-wise (batch, length, L, N); None before one."""
    return _source(model).last


@contextmanager
def constant_gates(model: nn.Module, gates: Sequence[float] | Tensor, adapter: str = ADAPTER) -> Iterator[None]:
    """Inside, every token has these gates, (N,) or (L, N), and the base's own pass is left out.

    Raises:
        InputError: they are not one for each expert (and module).
    """
    source, layers = _source(model), _layers(model, adapter)
    like = next(iter(layers.values())).factors(adapter).A
    given = torch.as_tensor(gates, dtype=like.dtype, device=like.device)
    _check_gates(given, layers, len(names(model, adapter)))
    source.fixed = given
    try:
        yield
    finally:
        source.fixed = None


def _check_gates(given: Tensor, layers: Mapping[str, Any], experts: int) -> None:
    if tuple(given.shape) not in ((experts,), (len(layers), experts)):
        raise InputError(
            f"The gates are {tuple(given.shape)}, but there are {experts} experts on {len(layers)} modules: give "
            f"({experts},) or ({len(layers)}, {experts})."
        )


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str = ADAPTER) -> Tensor:
    """The mean gates over the tokens of ``batches`` (arguments of the model), padding left out: (L, N).

    Raises:
        InputError: there is no token.
    """
    layers = _layers(model, adapter)
    total, count = torch.zeros(len(layers), len(names(model, adapter)), dtype=torch.float64), 0.0
    for batch in batches:
        model(**batch)
        found = last_gates(model)
        assert found is not None
        each = found if found.ndim == 4 else found[:, :, None].expand(-1, -1, len(layers), -1)
        mask = batch.get("attention_mask")
        weight = torch.ones(each.shape[:2]) if mask is None else mask[:, -each.shape[1] :].float().cpu()
        total += (each.cpu().double() * weight[..., None, None]).sum((0, 1))
        count += float(weight.sum())
    if not count:
        raise InputError("There are no tokens to average the gates over.")
    return (total / count).float()


@torch.no_grad()
def as_lora(model: nn.Module, gates: Sequence[float] | Tensor, adapter: str = ADAPTER) -> dict[str, LoraLayer]:
    """With constant gates, an X-LoRA is one ordinary LoRA of rank sum_n r_n: module path -> layer.

    Args:
        gates: (N,) or (L, N), for instance :func:`mean_gates`.

    Raises:
        InputError: the gates do not fit, or an expert with a gate is DoRA, whose mixture is no LoRA.
    """
    layers = _layers(model, adapter)
    given = torch.as_tensor(gates, dtype=torch.float32)
    _check_gates(given, layers, len(names(model, adapter)))
    return {
        path: layer.as_lora(adapter, given if given.ndim == 1 else given[position])
        for position, (path, layer) in enumerate(layers.items())
    }


# ------------------------------------------------------------------------------------------------ other programs' files


def from_file(model: Any, file: XLoraFile, experts: Sequence[Expert], adapter: str = ADAPTER) -> PeftModel:
    """``model`` (which is changed) with an X-LoRA of another program.

    Args:
        file: as read (:mod:`adapters.formats.xlora`, :mod:`adapters.formats.peft_xlora`).
        experts: those it names, in its order.

    Raises:
        InputError: as :func:`add`, or the classifier is not for these experts and this base.
    """
    source = f"'{file.path}'"
    layers = file.classifier
    options = ClassifierOptions(
        depth=len(layers), size=int(layers[0][0].shape[0]) if len(layers) > 1 else 2048, dropout=file.dropout,
        relu=file.relu, layerwise=file.layerwise, softmax=file.softmax and not file.softmax_of_top_k,
        softmax_of_top_k=file.softmax_of_top_k, temperature=file.temperature, top_k=file.top_k,
        pass_value=file.pass_value, weight=file.weight, width=int(layers[0][0].shape[1]),
    )  # fmt: skip
    if file.softmax and file.softmax_of_top_k:
        raise InputError(
            f"{source} uses a softmax of a softmax, which is nearly uniform: train it with one of the two."
        )
    config = config_for(model, experts, options)
    check_outputs(file, experts, len(config.frozen), source)
    wrapped = get_peft_model(model, config, adapter_name=adapter)
    fill(wrapped, experts, adapter)
    with torch.no_grad():
        for (weight, bias), (own_weight, own_bias) in zip(
            layers, classifier(wrapped, adapter).linear_layers(), strict=True
        ):
            own_weight.copy_(weight)
            own_bias.copy_(bias)
    return wrapped


@torch.no_grad()
def experts_of(model: nn.Module, adapter: str = ADAPTER) -> dict[str, dict[str, LoraLayer]]:
    """The experts as ordinary LoRAs, the scale in B: name -> module path -> layer, in the order of the gates.

    Raises:
        InputError: one is DoRA, of which only the effect is kept.
    """
    found: dict[str, dict[str, LoraLayer]] = {name: {} for name in names(model, adapter)}
    for path, layer in _layers(model, adapter).items():
        factors, owner = layer.factors(adapter), layer.owner(adapter).cpu()
        for number, name in enumerate(found):
            if factors.magnitude is not None and bool(factors.magnitude[number].any()):
                raise InputError(f"The expert '{name}' is DoRA, which is no LoRA on its own: use its own file.")
            own = owner == number
            if bool(own.any()):
                A, B = factors.A.detach().cpu()[own], factors.B.detach().cpu()[:, own]
                found[name][path] = LoraLayer(A.clone(), B.clone(), alpha=float(A.shape[0]))
    return found


def to_file(model: nn.Module, adapter: str = ADAPTER) -> XLoraFile:
    """The X-LoRA without its experts, as :func:`adapters.formats.peft_xlora.write_xlora` takes it."""
    made = classifier(model, adapter)
    options = made.options
    pairs = tuple((weight.detach().cpu(), bias.detach().cpu()) for weight, bias in made.linear_layers())
    return XLoraFile(
        "memory", pairs, options.relu, tuple(NamedExpert(name) for name in names(model, adapter)),
        layerwise=options.layerwise, softmax=options.softmax, softmax_of_top_k=options.softmax_of_top_k,
        temperature=options.temperature, top_k=options.top_k, pass_value=options.pass_value, weight=options.weight,
        dropout=options.dropout,
    )  # fmt: skip
