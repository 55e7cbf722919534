"""Auxiliary losses on what the routers decided in the last forward pass, and how evenly they loaded the experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.experts.config import MoeConfig
from adapters.layers.experts.routing import TYPES_COLUMN, Record, Routing, routing_of


def aux_loss(model: nn.Module, adapter: str | None = None) -> Tensor:
    """coefficient x loss of the last forward pass, for training loops of one's own: add it to the task's loss.

    With gradient accumulation divide it as the task's loss is divided.

    Args:
        model: with expert layers, wrapped by PEFT or not.
        adapter: its name; None = the sum over the adapters that took part.

    Raises:
        InputError: the localized loss without the samples' types.
    """
    routing = routing_of(model)
    names = [adapter] if adapter is not None else list(routing.records)
    found = [total(routing, name) for name in names if name in routing.records]
    return torch.stack(found).sum() if found else next(model.parameters()).new_zeros((), dtype=torch.float32)


def total(routing: Routing, adapter: str) -> Tensor:
    """coefficient x loss of one adapter: a scalar in fp32, 0 where nothing was recorded."""
    config, records = routing.configs[adapter], list(routing.records.get(adapter, {}).values())
    if not records or not config.collects:
        return torch.zeros(())
    values = torch.stack([_value(config, group) for group in pools(config, records)])
    return config.aux_coefficient * (values.sum() if config.aux_reduce == "sum" else values.mean())


def pools(config: MoeConfig, records: Sequence[Record]) -> list[list[Record]]:
    """The records that are pooled into one value each."""
    if config.aux_scope == "model":
        return [list(records)]
    if config.aux_scope == "module" or config.aux_loss == "localized":
        return [[record] for record in records]
    by_layer: dict[int | str, list[Record]] = {}
    for record in records:
        by_layer.setdefault(record.module if record.layer is None else record.layer, []).append(record)
    return list(by_layer.values())


def _value(config: MoeConfig, records: list[Record]) -> Tensor:
    if len({record.probabilities.shape[-1] for record in records}) > 1:
        raise InputError(
            "Routers of layers with different numbers of experts cannot be pooled into one loss: set aux_scope to "
            "'layer'."
        )
    if config.aux_loss == "localized":
        return torch.stack([localized(record, config) for record in records]).sum()
    if config.aux_loss == "sample_balance":
        return sample_balance(records, config.aux_norm)
    return load_balance(records, config.aux_norm)


def _counts(record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, N) probabilities, (B, T, N) chosen as 0 and 1, (B, T, 1) weight of each token; all in fp32."""
    p = record.probabilities
    assert record.chosen is not None
    hits = F.one_hot(record.chosen, p.shape[-1]).sum(2).to(p.dtype)
    weight = torch.ones_like(p[..., :1]) if record.mask is None else record.mask[..., None].to(p.dtype)
    return p, hits, weight


def _scaled(products: Tensor, k: Tensor, experts: int, norm: str) -> Tensor:
    """sum_i F_i P_i with sum F = k -> the term whose value at uniform routing is ``norm``."""
    by_one = products / k
    return {"1/N": by_one, "one": experts * by_one, "k": experts * products}[norm]


def load_balance(records: Iterable[Record], norm: str = "k") -> Tensor:
    """N sum_i F_i P_i over the tokens of all records, padding left out.

    F_i is the share of tokens that chose expert i (these sum to k), P_i the mean probability. ``norm`` is the value at
    uniform routing: "k" (Switch and Mixtral's form), "one" (MoLA's: F sums to 1) or "1/N".
    """
    parts = [_counts(record) for record in records]
    weight = sum(part[2].sum() for part in parts)
    weight = torch.as_tensor(weight).clamp_min(1)
    P = torch.stack([(p * w).sum((0, 1)) for p, _, w in parts]).sum(0) / weight
    share = torch.stack([(hits * w).sum((0, 1)) for _, hits, w in parts]).sum(0) / weight
    return _scaled((share * P).sum(), share.sum().clamp_min(1e-9), P.numel(), norm)


def sample_balance(records: Iterable[Record], norm: str = "one") -> Tensor:
    """The same within each sample over its tokens of all records, then the mean over samples (LLaVA-MoLE)."""
    parts = [_counts(record) for record in records]
    weight = torch.stack([w.sum((1, 2)) for _, _, w in parts]).sum(0)  # (B,)
    present = weight > 0
    divided = weight.clamp_min(1)[:, None]
    P = torch.stack([(p * w).sum(1) for p, _, w in parts]).sum(0) / divided
    share = torch.stack([(hits * w).sum(1) for _, hits, w in parts]).sum(0) / divided
    each = _scaled((share * P).sum(1), share.sum(1).clamp_min(1e-9), P.shape[1], norm)
    return each[present].mean() if bool(present.any()) else each.sum() * 0


def localized(record: Record, config: MoeConfig) -> Tensor:
    """LoRAMoE's localized balancing constraint for one router (arXiv 2312.09979, section 3.3).

    Q (samples, N) sums each sample's gates over its tokens; Z = I Q with I = 1 + delta or 1 - delta by the sample's
    type and the expert's half; the loss is the relative variance of all entries of Z. The half whose coefficient is 1
    + delta gets *less* mass, so a sample of group 1 ends on the second half.

    Raises:
        InputError: types are missing, too few, or not among ``lbc_groups``.
    """
    p = record.probabilities
    group = _groups(record, config)
    weight = torch.ones_like(p[..., :1]) if record.mask is None else record.mask[..., None].to(p.dtype)
    mass = (p * weight).sum(1)
    if config.lbc_per_token:
        mass = mass / weight.sum(1).clamp_min(1)
    first = torch.arange(p.shape[-1], device=p.device) < p.shape[-1] // 2
    more = first[None, :] == (group == 1)[:, None]
    Z = (torch.where(more, 1 + config.lbc_delta, 1 - config.lbc_delta) * mass).flatten()
    variance, mean = Z.var(unbiased=True), Z.mean()
    return variance / (mean.square() + 1e-10) if config.lbc_form == "cv2" else variance / (mean + 1e-10)


def _groups(record: Record, config: MoeConfig) -> Tensor:
    """(B,) the group of each sample."""
    batch = record.probabilities.shape[0]
    if record.types is None:
        raise InputError(
            f"The localized loss needs the type of each sample: add the column '{TYPES_COLUMN}' to the rows, or set "
            "aux_coefficient to 0."
        )
    types = torch.as_tensor(record.types).reshape(-1)
    if len(types) != batch:
        raise InputError(f"There are {len(types)} sample types for a batch of {batch}: give one for each sample.")
    unknown = [kind for kind in types.tolist() if kind not in config.lbc_groups]
    if unknown:
        known = ", ".join(map(str, config.lbc_groups))
        raise InputError(
            f"The sample type {unknown[0]} is not among the declared ones ({known}): add it to lbc_groups."
        )
    return torch.tensor([config.lbc_groups[kind] for kind in types.tolist()], device=record.probabilities.device)


@dataclass(frozen=True)
class Load:
    """How evenly one router used its experts.

    Attributes:
        module, layer: where.
        fraction: of the choices (of the gates' mass for a dense router) that went to each expert; sums to 1.
        ratio: largest over smallest fraction; inf if an expert was not used.
        entropy: of a token's probabilities, mean over tokens, in nats.
        unused: experts without a token.
    """

    module: str
    layer: int | None
    fraction: tuple[float, ...]
    ratio: float
    entropy: float
    unused: int


@torch.no_grad()
def load(records: Iterable[Record]) -> list[Load]:
    """The load of each router."""
    found = []
    for record in records:
        p = record.probabilities
        weight = torch.ones_like(p[..., :1]) if record.mask is None else record.mask[..., None].to(p.dtype)
        hits = p if record.chosen is None else _counts(record)[1]
        used = (hits * weight).sum((0, 1))
        fraction = used / used.sum().clamp_min(1e-9)
        entropy = -(p * p.clamp_min(1e-30).log() * weight).sum() / weight.sum().clamp_min(1)
        least = float(fraction.min())
        found.append(
            Load(
                record.module, record.layer, tuple(fraction.tolist()),
                float(fraction.max()) / least if least else float("inf"), float(entropy), int((used == 0).sum()),
            )
        )  # fmt: skip
    return found
