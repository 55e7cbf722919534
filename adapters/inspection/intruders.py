"""Intruder dimensions: LoRA vs Full Fine-tuning, An Illusion of Equivalence, arXiv 2410.21228 (NeurIPS 2025).

W0 = U S V^T before, W1 = W0 + s B A = Y T Z^T after, singular values descending. Vector y_j, j < k, is an intruder if
it is similar to none of the base's: max_i |<y_j, u_i>| < eps over all i. Full fine-tuning has almost none, low-rank
LoRA many. Mitigation scales them, with the triplets of W1:

    W(lambda) = W1 + (lambda - 1) sum_{j in I} t_j y_j z_j^T        1 unchanged, 0 removed, above 1 amplified

which as an adapter is A' = [A; Z_I^T], B' = [s B, (lambda - 1) Y_I T_I], exactly, at rank r + |I|. Whether removing
intruders preserves old knowledge better than shrinking the whole update to the same size (:func:`shrink`) is contested,
so every result comes with that control.

PEFT's ``reduce_intruder_dimension`` documents lambda the wrong way round, silently truncates the result to rank r, and
takes the current base weight for W0 even where an init has changed it.

U comes from the eigenvectors of the smaller Gram matrix in fp64, the largest triplets of W1 from subspace iteration
with a residual check (unconverged vectors would look like intruders). W0 is (out, in); a convolution is
(out, in * kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile, LoraLayer, group_dict
from adapters.layers.products import identity_pair
from adapters.layers.variant import base_weight, effective
from adapters.low_rank import compact_svd, top_singular
from adapters.merging.concatenate import cut, join
from adapters.options import Option, Rule, Training
from adapters.plugin import Answers, Handles, Outputs, Plugin, matrices_of
from adapters.progress import Monitor, Progress, Silent, check

METHOD = Method(
    name="intruders",
    title="Intruder dimensions",
    summary="Finds new directions that an adapter put among a weight's largest, and scales them.",
    stage="inspection",
    makes="report, ordinary LoRA",
    paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228",
    entry="adapters.inspection.intruders:inspect",
    training=Training(
        key="intruders_every",
        options=(
            Option(
                "intruders_every",
                0,
                ge=0,
                help="Count intruder dimensions every N steps and log them; 0 = never.",
            ),
        ),
        refused=(
            Rule(
                "use_dora",
                "intruder dimensions are counted during training for plain low-rank layers only: set intruders_every "
                "to 0, or inspect the finished adapter",
            ),
        ),
        plugin="adapters.inspection.intruders:IntruderPlugin",
    ),
)

Side = Literal["left", "right", "both"]
Weights = Callable[[str, str], Tensor]
"""(component, module) -> W0 (out, in * kernel)."""

EXACT = 256
"""The SVD of W1 is exact if its smaller side has at most this many rows or columns."""

GROUP = 0.01
"""Relative difference up to which base singular values count as equal, so that their vectors are interchangeable."""


@dataclass(frozen=True)
class Spectrum:
    """All left singular vectors of a base weight (out, n) and its values (n,), fp64."""

    U: Tensor
    S: Tensor


@dataclass(frozen=True)
class Found:
    """The first k directions of a weight after training.

    Attributes:
        side: "left" or "right", the singular vectors compared.
        Y (out, k), T (k,), Z (k, in): triplets of W1.
        cosines: |cos| with the most similar base vector (k,).
        groups: length of the projection on all base vectors with (nearly) the same singular value as that one (k,).
        intruders: the j with a cosine below eps.
    """

    side: str
    Y: Tensor
    T: Tensor
    Z: Tensor
    cosines: Tensor
    groups: Tensor
    intruders: tuple[int, ...]


@dataclass(frozen=True)
class LayerReport:
    """One layer (see :class:`Report`)."""

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    relative_change: float
    base_norm: float
    tuned_norm: float
    stable_rank: float
    intruders: int
    positions: tuple[int, ...]
    norm: float
    values: tuple[float, ...]
    overlaps: tuple[float, ...]
    cosines: tuple[float, ...]
    group_cosines: tuple[float, ...]
    ambiguous: tuple[int, ...]
    captured: float


@dataclass(frozen=True)
class Report:
    """The report on an adapter.

    Per layer: ``norm`` |dW| and ``relative_change`` |dW| / |W0| (Frobenius), ``base_norm`` and ``tuned_norm``
    (spectral), ``stable_rank`` |dW|_F^2 / |dW|_2^2; for all k directions ``cosines``, ``group_cosines``, ``values`` t_j
    and ``overlaps`` y_j^T dW z_j; ``positions`` of the intruders among them, ``ambiguous`` those that are no intruders
    by their group cosine, ``captured`` the share of |dW|^2 in the span of the intruders.
    """

    k: int
    eps: float
    side: str
    layers: tuple[LayerReport, ...]

    @property
    def total(self) -> int:
        """Number of intruders in all layers."""
        return sum(layer.intruders for layer in self.layers)

    def by_kind(self) -> dict[str, int]:
        """Number of intruders by the last name of the module (to_q, up_proj, ...)."""
        found: dict[str, int] = {}
        for layer in self.layers:
            words = [word for word in layer.name.split(".") if not word.isdigit()]
            found[words[-1]] = found.get(words[-1], 0) + layer.intruders
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"k": self.k, "eps": self.eps, "side": self.side, "total": self.total, "of": self.k * len(self.layers),
                "by_kind": self.by_kind(), "layers": [asdict(layer) for layer in self.layers]}  # fmt: skip


# ------------------------------------------------------------------------------------------------ one matrix


def spectrum(W0: Tensor) -> Spectrum:
    """Left singular vectors and singular values of a weight (out, in), from its smaller Gram matrix."""
    W = W0.double()
    if W.shape[0] <= W.shape[1]:
        values, U = torch.linalg.eigh(W @ W.T)
        return Spectrum(U.flip(1), values.flip(0).clamp_min(0).sqrt())
    values, V = torch.linalg.eigh(W.T @ W)
    S = values.flip(0).clamp_min(0).sqrt()
    kept = S.max() * 1e-7 < S if S.numel() and S.max() > 0 else torch.zeros_like(S, dtype=torch.bool)
    return Spectrum((W @ V.flip(1))[:, kept] / S[kept], S[kept])


def find(W0: Tensor, left: Tensor, right: Tensor, k: int = 10, eps: float = 0.5, base: Spectrum | None = None) -> Found:
    """Intruders among the left singular vectors of W0 + left @ right.

    Args:
        W0: the base weight (out, in).
        left, right: the update's factors (out, r), (r, in).
        k: number of directions compared.
        eps: cosine below which a direction is an intruder.
        base: :func:`spectrum` of W0, if already computed.

    Raises:
        InputError: k or eps out of range, different shapes, or values that are not finite.
    """
    check_options(k, eps, W0.shape)
    if left.shape[0] != W0.shape[0] or right.shape[1] != W0.shape[1]:
        raise InputError(
            f"The adapter is {left.shape[0]} x {right.shape[1]}, the base weight {W0.shape[0]} x {W0.shape[1]}."
        )
    if not all(bool(tensor.isfinite().all()) for tensor in (W0, left, right)):
        raise InputError("A weight holds values that are not finite.")
    base = base or spectrum(W0)
    precise = torch.float64 if min(W0.shape) <= EXACT else torch.float32
    W, L, R = (tensor.to(precise) for tensor in (W0, left, right))
    if min(W.shape) <= EXACT:
        U, S, Vh = torch.linalg.svd(W + L @ R, full_matrices=False)
        Y, T, Z = U[:, :k], S[:k], Vh[:k]
    else:
        Y, T, Z = top_singular(lambda x: W @ x + L @ (R @ x), lambda y: W.T @ y + R.T @ (L.T @ y), W, k)
    Y, T, Z = Y.double(), T.double(), Z.double()
    cosines, groups = _similarity(base, Y)
    return Found("left", Y, T, Z, cosines, groups, tuple(int(j) for j in range(k) if cosines[j] < eps))


def check_options(k: int, eps: float, shape: Sequence[int]) -> None:
    """Raise :class:`InputError` if k or eps is out of range for a layer of this shape."""
    if not 1 <= k <= min(shape):
        raise InputError(f"k must be from 1 to {min(shape)} for a layer of {shape[0]} x {shape[1]}, got {k}.")
    if not 0 < eps <= 1:
        raise InputError(f"eps is a cosine in (0, 1], got {eps}.")


def _similarity(base: Spectrum, Y: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Per column of Y the largest |cos| with a base vector, and the length of the projection on that vector's group."""
    if base.U.shape[1] == 0:
        return torch.zeros(Y.shape[1]).double(), torch.zeros(Y.shape[1]).double()
    products = torch.cat([(base.U[:, i : i + chunk].T @ Y).abs() for i in range(0, base.U.shape[1], chunk)])
    cosines, places = products.max(0)
    nearby = (base.S[:, None] - base.S[places][None]).abs() <= GROUP * base.S[places][None]
    return cosines.clamp(max=1), (products.square() * nearby).sum(0).sqrt().clamp(max=1)


def mitigate(layer: LoraLayer, found: Found, strength: float) -> LoraLayer:
    """The layer with its intruders scaled by lambda = ``strength``, exactly: rank r + |I|, scale 1."""
    if strength == 1 or not found.intruders:
        return layer
    chosen = list(found.intruders)
    Y, T, Z = found.Y[:, chosen], found.T[chosen], found.Z[chosen]
    A = torch.cat([layer.A.double().flatten(1), Z.to(layer.A.device)])
    B = torch.cat([layer.scale * layer.B.double().flatten(1), ((strength - 1) * Y * T).to(layer.B.device)], dim=1)
    rank, dtype = A.shape[0], layer.A.dtype
    return LoraLayer(
        A.to(dtype).reshape(rank, *layer.A.shape[1:]),
        B.to(dtype).reshape(B.shape[0], rank, *layer.B.shape[2:]),
        alpha=float(rank),
        embedding=layer.embedding,
    )


# ------------------------------------------------------------------------------------------------ adapters and models


def inspect(
    file: LoraFile, weights: Weights, k: int = 10, eps: float = 0.5, side: Side = "left", monitor: Monitor | None = None
) -> tuple[Report, dict[tuple[str, str], list[Found]]]:
    """The report on an adapter, and per layer what :func:`soften` needs.

    Args:
        file: fitted to the base (module paths of the model).
        weights: the untouched base's weights.
        k: number of directions per layer.
        eps: cosine below which a direction is an intruder.
        side: which singular vectors; "both" compares left and right ones.
        monitor: receives progress per layer and may cancel.

    Raises:
        InputError: an empty adapter, a layer whose shape differs from the base's, or an option out of range.
        Cancelled: the monitor asked to stop.
    """
    if side not in ("left", "right", "both"):
        raise InputError(f"side must be 'left', 'right' or 'both', got '{side}'.")
    monitor = monitor or Silent()
    layers = list(file.layers())
    if not layers:
        raise InputError("The adapter has no layers to inspect.")
    reports, kept = [], {}
    for number, (component, module, layer) in enumerate(layers):
        check(monitor)
        monitor.report(Progress("inspecting", number + 1, len(layers)))
        try:
            W0 = weights(component, module)
            left, right = update_of(layer, W0)
            base = spectrum(W0)
            found = _sides(W0, left, right, k, eps, side, base)
            reports.append(_report(f"{component}.{module}", W0, layer, left, right, found, eps, float(base.S.max())))
        except InputError as error:
            raise InputError(f"{component}.{module}: {error}") from None
        kept[component, module] = found
    return Report(k, eps, side, tuple(reports)), kept


def update_of(layer: LoraLayer, W0: Tensor) -> tuple[Tensor, Tensor]:
    """(L, R) with W1 = W0 + L R; for a DoRA layer, of the full size."""
    left, right = layer.scale * layer.B.float().flatten(1), layer.A.float().flatten(1)
    if layer.magnitude is None:
        return left, right
    total = W0.float() + left @ right
    tuned = total * (layer.magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return tuned - W0.float(), torch.eye(W0.shape[1])


def _sides(W0: Tensor, left: Tensor, right: Tensor, k: int, eps: float, side: Side, base: Spectrum) -> list[Found]:
    found = []
    if side in ("left", "both"):
        found.append(find(W0, left, right, k, eps, base))
    if side in ("right", "both"):
        other = find(W0.T, right.T, left.T, k, eps)
        found.append(replace(other, side="right", Y=other.Z.T, Z=other.Y.T))
    return found


def _report(
    name: str,
    W0: Tensor,
    layer: LoraLayer,
    left: Tensor,
    right: Tensor,
    found: Sequence[Found],
    eps: float,
    base_norm: float,
) -> LayerReport:
    first = found[0]
    values = compact_svd(left.double(), right.double())[1]
    size = float(values.square().sum())
    positions = tuple(sorted({j for one in found for j in one.intruders}))
    inside = 0.0
    if positions and size > 0:
        chosen = list(positions)
        # the part of dW in the span of the intruders' left vectors
        Q = torch.linalg.qr(first.Y[:, chosen])[0]
        inside = float((Q.T @ left.double() @ right.double()).square().sum() / size)
    ambiguous = tuple(j for j in first.intruders if first.groups[j] >= eps)
    norm = float(torch.linalg.vector_norm(W0.double()))
    return LayerReport(
        name=name,
        shape=(W0.shape[0], W0.shape[1]),
        rank=layer.rank,
        scale=layer.scale,
        relative_change=math.sqrt(size) / norm if norm > 0 else math.inf,
        base_norm=base_norm,
        tuned_norm=float(first.T[0]),
        stable_rank=size / float(values[0].square()) if size > 0 else 0.0,
        intruders=len(positions),
        positions=positions,
        norm=math.sqrt(size),
        values=tuple(first.T.tolist()),
        overlaps=tuple(((first.Y.T @ left.double()) * (first.Z @ right.double().T)).sum(1).tolist()),
        cosines=tuple(round(float(c), 4) for c in first.cosines),
        group_cosines=tuple(round(float(c), 4) for c in first.groups),
        ambiguous=ambiguous,
        captured=inside,
    )


def soften(
    file: LoraFile,
    found: Mapping[tuple[str, str], Sequence[Found]],
    strength: float,
    recompress: bool = False,
) -> tuple[LoraFile, dict[str, float]]:
    """The adapter with its intruders scaled by lambda = ``strength``, as an ordinary LoRA.

    Args:
        found: of :func:`inspect`; the first entry's triplets are scaled (the left side, unless only the right was
            inspected).
        strength: lambda; 1 = unchanged, 0 = removed.
        recompress: truncate every layer to its former rank.

    Returns:
        The adapter, and per truncated layer its relative error.

    Raises:
        InputError: a strength that is negative or not finite, or a DoRA adapter.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"lambda must be 0 (remove) or more (1 changes nothing), got {strength}.")
    if file.is_dora():
        raise InputError("The intruders of a DoRA adapter cannot be scaled: extract it as a LoRA first.")
    layers: dict[tuple[str, str], LoraLayer] = {}
    errors: dict[str, float] = {}
    for component, module, layer in file.layers():
        made = mitigate(layer, found[component, module][0], strength)
        if recompress and made.rank > layer.rank:
            made, errors[f"{component}.{module}"] = cut(made, layer.rank)
        layers[component, module] = made
    return file.with_parts(group_dict(layers)), errors


def shrink(file: LoraFile, factor: float) -> LoraFile:
    """The control for :func:`soften`: the whole update times ``factor``."""
    layers = {(c, m): join([(layer, factor)]) for c, m, layer in file.layers()}
    return file.with_parts(group_dict(layers))


def update_norm(file: LoraFile) -> float:
    """|dW|_F over all layers together."""
    total = 0.0
    for _, _, layer in file.layers():
        values = compact_svd(layer.scale * layer.B.double().flatten(1), layer.A.double().flatten(1))[1]
        total += float(values.square().sum())
    return math.sqrt(total)


def weights_of(models: Mapping[str, nn.Module]) -> Weights:
    """The weights of loaded models (component name -> model), dequantised."""

    def weight(component: str, module: str) -> Tensor:
        if component not in models:
            raise InputError(f"the base has no '{component}'")
        try:
            return base_weight(models[component].get_submodule(module))
        except AttributeError:
            raise InputError("the base has no such module") from None

    return weight


def between(base: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], least: int = 1) -> LoraFile:
    """The difference of two models as an adapter of full rank, for inspecting a pair of checkpoints.

    It covers linear layers, Conv1D, convolutions and embeddings that differ and have at least ``least`` rows and
    columns (which leaves out a table of two token types).

    Raises:
        InputError: no such layer differs, one is missing, or shapes differ.
    """
    layers: dict[tuple[str, str], LoraLayer] = {}
    for component, model in base.items():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim < 2:
                continue
            try:
                other = base_weight(tuned[component].get_submodule(name))
            except (AttributeError, KeyError):
                raise InputError(
                    f"The tuned model has no '{component}.{name}': the two models belong to different families."
                ) from None
            W0 = base_weight(module)
            if other.shape != W0.shape:
                raise InputError(
                    f"'{component}.{name}' is {tuple(W0.shape)} in one model, {tuple(other.shape)} in the other."
                )
            difference = other.float() - W0.float()
            if min(W0.shape) >= least and bool(difference.any()):
                B, A = identity_pair(difference)
                layers[component, name] = LoraLayer(
                    A.contiguous(), B.contiguous(), float(A.shape[0]), embedding=isinstance(module, nn.Embedding)
                )
    if not layers:
        raise InputError("The two models have the same weights: there is nothing to inspect.")
    return LoraFile(group_dict(layers))


def heat_map(W0: Tensor, layer: LoraLayer, size: int = 64) -> Tensor:
    """|U^T Y| of the first ``size`` base and tuned directions (size, size), as in the paper's figure."""
    left, right = update_of(layer, W0)
    Y = torch.linalg.svd(W0.double() + left.double() @ right.double(), full_matrices=False)[0]
    return (spectrum(W0).U[:, :size].T @ Y[:, :size]).abs()


class IntruderPlugin(Plugin):
    """Counts intruder dimensions every N steps; the latest count is logged with each step."""

    name = "intruders"

    def configure(self, config: Any) -> None:
        self.every = config.intruders_every
        self.logs: dict[str, float] = {}

    def after_inject(self, handles: Handles) -> None:
        self.layers, self.adapter = matrices_of(handles), handles.adapter
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
