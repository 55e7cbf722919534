"""LoRA3D: a pointmap network that calibrates itself to one scene.

"LoRA3D: Low-Rank Self-Calibration of 3D Geometric Foundation Models" (arXiv 2412.07746). From some ten pictures and no
labels:

1. all pairs' pointmaps are aligned while every pixel's confidence is weighed anew: the joint minimum of
   sum [ w e + mu (sqrt w - sqrt C)^2 ] over w at fixed geometry is  w = C / (1 + e / mu)^2,  which caps the influence
   of a confident outlier at C mu;
2. the aligned points chi, moved into each pair's first camera and kept where w > cutoff, are pseudo labels;
3. a LoRA adapter (y = W0 x + s B A x on the attention's q, k, v; rank 16, s = 1) learns them with DUSt3R's own loss.

C is log(conf) here: the network's confidence is always above 1, and the thresholds 0.5 and 1.5 belong to the log. The
first hundred steps are not reweighted: from step 0 a small mu freezes a bad start. Trained: A, B. Stored: an ordinary
PEFT LoRA with ``scene.json`` beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters import files
from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.geometry import alignment
from pipelines.geometry.alignment import Alignment, Reweight
from pipelines.geometry.images import Photo
from pipelines.geometry.inference import Predictions, precision
from pipelines.geometry.network import Encoded
from pipelines.geometry.objective import confidence_loss
from pipelines.geometry.pairs import Pair
from pipelines.geometry.verification import Verified, verified

METHOD = Method(
    name="lora3d",
    title="LoRA3D",
    summary="Calibrates a pointmap network to one scene from its own, robustly aligned predictions.",
    stage="task",
    makes="ordinary LoRA",
    paper="LoRA3D: Low-Rank Self-Calibration of 3D Geometric Foundation Models, arXiv 2412.07746",
    entry="pipelines.geometry.calibration:calibrate",
)

TARGETS = {
    "paper-18mb": r"(enc_blocks|dec_blocks2?)\.\d+\.(attn\.qkv|cross_attn\.proj[qkv])",
    "all-attention": r"(enc_blocks|dec_blocks2?)\.\d+\.(attn\.(qkv|proj)|cross_attn\.proj[qkv]?)",
}
"""Presets: which layers get a LoRA (rank 16 on the ViT-L models: 18.1 and 26 MB in fp32)."""

ENTERS = 0.5
"""Pixels less confident than this (in the transformed domain) never get weight."""

LEAST_KEPT = 0.05
"""An edge is left out when either of its views keeps less than this share of its pixels as labels."""
TOO_FEW, FALLBACK_KEPT = 0.2, 0.5
"""A cutoff that keeps less than the first share of all pixels is lowered to keep the second. Of 0.2, 0.4 and 0.6 the
larger was better each time on the two rooms tried, which serve no judgement."""


# ------------------------------------------------------------------------------------------------ robust weights


def calibrated(confidence: Tensor, distance: Tensor, mu: float) -> Tensor:
    """w = C / (1 + e / mu)^2, and 0 where C is below 0.5."""
    return torch.where(confidence > ENTERS, confidence / (1 + distance / mu) ** 2, 0.0)


def reweighting(mu: float, warmup: int = 100, every: int = 10) -> Reweight:
    """For :func:`pipelines.geometry.alignment.align`: new weights every ``every`` steps after the warm-up.

    Raises:
        InputError: ``mu`` is not positive.
    """
    if not mu > 0:
        raise InputError(f"mu must be more than 0, got {mu}; 0.03 suits most scenes.")

    def update(step: int, confidence: Tensor, distance: Tensor) -> Tensor | None:
        if step < warmup:
            return torch.where(confidence > ENTERS, confidence, 0.0) if step == 0 else None
        return calibrated(confidence, distance, mu) if (step - warmup) % every == 0 else None

    return update


def robust_alignment(
    predictions: Predictions, mu: float = 0.03, warmup: int = 100, steps: int = 300, **options: Any
) -> Alignment:
    """Global alignment with calibrated confidence; ``weights`` of the result are w*, settled on the final geometry."""
    scene = alignment.align(predictions, steps, reweight=reweighting(mu, warmup), **options)
    raw = torch.stack([predictions.confidence1, predictions.confidence2]).cpu()
    start = alignment.transformed(raw, options.get("transform", "log"))
    scene.weights = calibrated(start, scene.distances, mu)
    return scene


def shared(scene: Alignment, pairs: Sequence[Pair], wanted: Sequence[Pair]) -> Alignment:
    """The scene with weights for ``wanted`` pairs: a pixel's largest over all aligned ``pairs`` that hold its picture.

    All pairs label a pixel with the same point, so one pair that confirms it is enough.
    """
    best = torch.zeros_like(scene.depth)
    for edge, pair in enumerate(pairs):
        for side, n in enumerate(pair):
            best[n] = torch.maximum(best[n], scene.weights[side, edge])
    weights = torch.stack([best[[pair[side] for pair in wanted]] for side in (0, 1)])
    return replace(scene, weights=weights)


# ------------------------------------------------------------------------------------------------ pseudo labels


@dataclass
class Labels:
    """Pseudo labels of ordered pairs, in the first camera's frame.

    Shapes: points1, points2 ``(E, P, 3)``; valid1, valid2 ``(E, P)``.
    """

    sizes: tuple[tuple[int, int], ...]
    pairs: tuple[Pair, ...]
    points1: Tensor
    points2: Tensor
    valid1: Tensor
    valid2: Tensor
    cutoff: float
    kept: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def pseudo_labels(scene: Alignment, pairs: Sequence[Pair], cutoff: float = 1.5) -> Labels:
    """Labels of every edge both of whose views keep at least 5 % of their pixels (w > ``cutoff``).

    When less than 20 % of all pixels are left, or fewer edges than there are images, the cutoff is lowered to keep
    half of them, and a warning says so.

    Raises:
        InputError: the cutoff is not positive, the poses are degenerate, or no edge is left.
    """
    if not cutoff > 0:
        raise InputError(f"The cutoff must be more than 0, got {cutoff}; 1.5 suits most scenes.")
    check_poses(scene)
    warnings = []
    edges = _surviving(scene, pairs, cutoff)
    real = scene.weights[torch.stack([_real(scene, pairs, side) for side in (0, 1)])]
    share = float((real > cutoff).float().mean())
    if share < TOO_FEW or len(edges) < len(scene.sizes):
        lower = float(_quantile(real, 1 - FALLBACK_KEPT))
        if 0 < lower < cutoff:
            warnings.append(
                f"The cutoff {cutoff:g} keeps {share:.0%} of the pixels, in {len(edges)} of {len(pairs)} pairs: "
                f"lowered to {lower:.3g}, which keeps {FALLBACK_KEPT:.0%}."
            )
            cutoff = lower
            edges = _surviving(scene, pairs, cutoff)
    if not edges:
        raise InputError(
            f"No pair of images keeps enough pixels at the cutoff {cutoff:g}: the pictures agree too little. Take "
            "pictures with more overlap, or lower the cutoff."
        )
    world = [_world(scene, n) for n in range(len(scene.sizes))]
    points = []
    for side in (0, 1):
        own = []
        for edge in edges:
            pose = scene.poses[pairs[edge][0]]
            own.append((world[pairs[edge][side]] - pose[:3, 3]) @ pose[:3, :3])
        points.append(torch.stack(own))
    keep = scene.weights[:, edges] > cutoff
    shares = {f"{pairs[e][0]}-{pairs[e][1]}": round(float(_share(scene, pairs, e, cutoff).mean()), 4)
              for e in range(len(pairs))}  # fmt: skip
    return Labels(
        scene.sizes, tuple(pairs[e] for e in edges), points[0], points[1], keep[0], keep[1], cutoff, shares, warnings
    )


def scene_labels(scene: Alignment, seen: Verified, pairs: Sequence[Pair], cutoff: float = 1.5) -> Labels:
    """Labels for all ``pairs`` within a group of believed pairs, aligned or not, from points that one pair confirms.

    Raises:
        InputError: as :func:`pseudo_labels`; no two pictures are in one group.
    """
    wanted = seen.within(pairs)
    if not wanted:
        raise InputError(
            "No two pictures agree in colour where their points meet: take pictures with more overlap, or calibrate "
            "without this check (--no-verify)."
        )
    return pseudo_labels(shared(scene, seen.predictions.pairs, wanted), wanted, cutoff)


def check_poses(scene: Alignment) -> None:
    """Raise :class:`InputError` when the cameras are not finite or all stand in one place."""
    centres = scene.poses[:, :3, 3]
    if not scene.poses.isfinite().all() or not scene.depth.isfinite().all():
        raise InputError("The aligned cameras are not finite: these pictures cannot calibrate the model.")
    if still(scene):
        raise InputError(
            f"All {len(centres)} cameras stand in the same place: identical pictures or a turn on the spot hold no "
            "depth to calibrate on."
        )


def still(scene: Alignment) -> bool:
    """Whether the cameras move less than a thousandth of the typical depth."""
    centres = scene.poses[:, :3, 3]
    typical = torch.stack([scene.depth_map(n).median() for n in range(len(centres))]).median()
    return bool((centres - centres.mean(0)).norm(dim=-1).max() < 1e-3 * typical)


def _world(scene: Alignment, n: int) -> Tensor:
    flat = scene.points(n).flatten(0, 1)
    return torch.cat([flat, flat.new_zeros(scene.depth.shape[1] - len(flat), 3)])


def _real(scene: Alignment, pairs: Sequence[Pair], side: int) -> Tensor:
    area = torch.tensor([scene.sizes[pair[side]][0] * scene.sizes[pair[side]][1] for pair in pairs])
    return torch.arange(scene.depth.shape[1]) < area[:, None]


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[min(len(values) - 1, int(share * len(values)))]


def _share(scene: Alignment, pairs: Sequence[Pair], edge: int, cutoff: float) -> Tensor:
    area = torch.tensor([math.prod(scene.sizes[n]) for n in pairs[edge]])
    return (scene.weights[:, edge] > cutoff).sum(1) / area


def _surviving(scene: Alignment, pairs: Sequence[Pair], cutoff: float) -> list[int]:
    return [e for e in range(len(pairs)) if bool((_share(scene, pairs, e, cutoff) >= LEAST_KEPT).all())]


# ------------------------------------------------------------------------------------------------ the adapter


@dataclass(frozen=True)
class Recipe:
    """How the adapter is trained.

    Raises:
        InputError: a value out of range.
    """

    rank: int = 16
    preset: Literal["paper-18mb", "all-attention"] = "paper-18mb"
    epochs: int = 10
    batch: int = 2
    lr: float = 1e-3
    final_lr: float = 1e-5
    alpha: float = 0.2
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or self.batch < 1 or not self.lr > 0:
            raise InputError("Rank, epochs and batch must be at least 1 and the learning rate more than 0.")
        if self.preset not in TARGETS:
            raise InputError(f"Unknown preset '{self.preset}': known are {', '.join(TARGETS)}.")


def with_lora(network: nn.Module, rank: int = 16, preset: str = "paper-18mb", seed: int = 0) -> Any:
    """The network as a :class:`peft.PeftModel` with a fresh adapter (B = 0: nothing changes yet).

    Raises:
        InputError: the rank exceeds a layer's smaller side.
    """
    import re

    from peft import LoraConfig, get_peft_model

    sides = [min(m.weight.shape) for name, m in network.named_modules()
             if isinstance(m, nn.Linear) and re.fullmatch(TARGETS[preset], name)]  # fmt: skip
    if rank < 1 or (sides and rank > min(sides)):
        raise InputError(f"The rank must lie between 1 and {min(sides, default=1)} for this model, got {rank}.")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[preset], bias="none")
        return get_peft_model(network, config)
    finally:
        torch.random.set_rng_state(state)


def cosine(step: int, steps: int, peak: float, floor: float) -> float:
    """Learning rate before a step: half a cosine from ``peak`` to ``floor`` over all steps."""
    return floor + (peak - floor) * (1 + math.cos(math.pi * step / max(1, steps - 1))) / 2


class AdapterTraining:
    """The training of a LoRA on the labels of one scene or several, a step at a time.

    Attributes:
        model: the PEFT model; its trainable parameters are moved.
        steps: how many there are.
        optimizer: AdamW; :meth:`step` sets its rate.
    """

    def __init__(
        self, model: Any, photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], recipe: Recipe
    ) -> None:  # fmt: skip
        self.model, self.photos, self.labels, self.recipe = model, photos, labels, recipe
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device
        self.optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01)
        generator = torch.Generator().manual_seed(recipe.seed)
        samples = [(scene, edge) for scene, kept in enumerate(labels) for edge in range(len(kept.pairs))]
        epochs = (_batches(samples, labels, recipe.batch, generator) for _ in range(recipe.epochs))
        self._plan = [batch for epoch in epochs for batch in epoch]
        self.steps = len(self._plan)

    def loss(self, step: int) -> Tensor:
        """DUSt3R's loss on the pairs of a step, with its graph; which pairs those are depends on ``step`` alone.

        Raises:
            InputError: it is not finite.
        """
        batch = self._plan[step]
        targets, valid = _targets(batch, self.labels, self.device)
        with precision(self.device, self.recipe.dtype):
            predicted = self.model.decode(*_encode(self.model, batch, self.photos, self.labels, self.device))
        loss = confidence_loss(predicted, targets, valid, self.recipe.alpha)
        if not loss.isfinite():
            raise InputError(f"The loss of step {step} is not finite: lower the learning rate.")
        return loss

    def step(self, step: int) -> float:
        """Do one step; returns its loss. Raises as :meth:`loss` does."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(step, self.steps, self.recipe.lr, self.recipe.final_lr)
        loss = self.loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def train_adapter(
    model: Any, photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], recipe: Recipe,
    monitor: Monitor | None = None,
) -> list[float]:  # fmt: skip
    """All steps of :class:`AdapterTraining`; returns the loss of each.

    Raises:
        InputError: a loss that is not finite.
        adapters.errors.Cancelled: ``monitor`` said so.
    """
    monitor = monitor or Silent()
    training = AdapterTraining(model, photos, labels, recipe)
    losses: list[float] = []
    for step in range(training.steps):
        check(monitor)
        losses.append(training.step(step))
        monitor.report(Progress("calibrate", step + 1, training.steps, loss=losses[-1]))
    return losses


Sample = tuple[int, int]


def _batches(
    samples: list[Sample], labels: Sequence[Labels], size: int, generator: torch.Generator
) -> list[list[Sample]]:
    """One epoch: every edge once, shuffled; a batch holds pairs of equal sizes."""
    order = [samples[k] for k in torch.randperm(len(samples), generator=generator).tolist()]
    groups: dict[Any, list[Sample]] = {}
    out = []
    for scene, edge in order:
        i, j = labels[scene].pairs[edge]
        key = (labels[scene].sizes[i], labels[scene].sizes[j])
        groups.setdefault(key, []).append((scene, edge))
        if len(groups[key]) == size:
            out.append(groups.pop(key))
    return out + list(groups.values())


def _encode(
    model: Any, batch: list[Sample], photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], device: torch.device
) -> list[Encoded]:
    """Both sides of a batch; a picture that several pairs share is encoded once."""
    sides = [[(scene, labels[scene].pairs[edge][side]) for scene, edge in batch] for side in (0, 1)]
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for scene, n in dict.fromkeys(sides[0] + sides[1]):
        groups.setdefault(photos[scene][n].size, []).append((scene, n))
    encoded = {
        size: model.encode(torch.stack([photos[scene][n].pixels for scene, n in group]).to(device) * 2 - 1)
        for size, group in groups.items()
    }
    out = []
    for side in sides:
        size = photos[side[0][0]][side[0][1]].size  # one size per side, see _batches
        index = torch.tensor([groups[size].index(key) for key in side], device=device)
        out.append(Encoded(encoded[size].tokens.index_select(0, index), encoded[size].grid))
    return out


def _targets(
    batch: list[Sample], labels: Sequence[Labels], device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    targets, valid = [], []
    for side in (0, 1):
        scene, edge = batch[0]
        h, w = labels[scene].sizes[labels[scene].pairs[edge][side]]
        points = [(labels[s].points1, labels[s].points2)[side][e, : h * w] for s, e in batch]
        masks = [(labels[s].valid1, labels[s].valid2)[side][e, : h * w] for s, e in batch]
        targets.append(torch.stack(points).unflatten(1, (h, w)).to(device))
        valid.append(torch.stack(masks).unflatten(1, (h, w)).to(device))
    return (targets[0], targets[1]), (valid[0], valid[1])


def calibrate(
    network: nn.Module, photos: Sequence[Sequence[Photo]], predictions: Sequence[Predictions], recipe: Recipe,
    mu: float = 0.03, warmup: int = 100, cutoff: float = 1.5, steps: int = 300, transform: str = "log",
    verify: bool = True, share: bool = True, monitor: Monitor | None = None,
) -> tuple[Any, list[Alignment], list[Labels], list[float]]:  # fmt: skip
    """Self-calibration to one scene or several: align robustly, label, train.

    Args:
        network: the base; it is wrapped, its own weights do not change.
        photos, predictions: one entry per scene.
        verify: leave pairs whose pictures contradict each other out of the alignment.
        share: a point that one pair confirms is a label in every pair of its picture; else only in pairs that confirm
            it themselves, as in the paper.

    Returns:
        The PEFT model, the robust alignments, the labels and the training losses.
    """
    scenes, labels = [], []
    for pictures, told in zip(photos, predictions, strict=True):
        seen = verified(told, pictures) if verify else Verified(told, [list(range(len(pictures)))], [])
        scene = robust_alignment(seen.predictions, mu, warmup, steps, transform=transform, monitor=monitor or Silent())
        found = scene_labels(scene, seen, told.pairs, cutoff) if share else pseudo_labels(
            scene, seen.predictions.pairs, cutoff
        )  # fmt: skip
        found.warnings[:0] = [f"Labels: {text}" for text in seen.said]
        scenes.append(scene)
        labels.append(found)
    model = with_lora(network, recipe.rank, recipe.preset, recipe.seed)
    return model, scenes, labels, train_adapter(model, photos, labels, recipe, monitor)


def save_adapter(model: Any, folder: Path, scene: dict[str, Any], half: bool = False) -> Path:
    """Write an ordinary PEFT adapter with ``scene.json`` beside it: whole or not at all."""
    from safetensors.torch import load_file, save_file

    with files.whole(folder) as part:
        model.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)
        if half:
            tensors = {k: v.half() for k, v in load_file(part / "adapter_model.safetensors").items()}
            save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        files.write_text(part / "scene.json", json.dumps(scene, indent=1))
    return folder


def load_adapter(network: nn.Module, folder: Path, base_sha256: str = "") -> tuple[Any, dict[str, Any]]:
    """Put a saved adapter on its base; returns the PEFT model and what ``scene.json`` says.

    Raises:
        InputError: no adapter there, made for another base, shapes that do not fit, or no plain LoRA.
    """
    from peft import PeftModel

    from adapters.formats import read
    from adapters.formats.fit import fit
    from adapters.formats.lora import MODEL

    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"'{folder}' holds no PEFT adapter (adapter_config.json is missing).")
    file = folder / "scene.json"
    try:
        scene = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        scene = None
    if not isinstance(scene, dict):
        raise InputError(f"'{file}' is damaged: delete it to use the adapter without what it says.")
    wanted = scene.get("base", {}).get("sha256", "")
    if wanted and base_sha256 and wanted != base_sha256:
        raise InputError(
            f"The adapter '{folder.name}' was made for another base ({scene['base'].get('name', wanted[:12])}): "
            "choose that one."
        )
    fit(read(folder), {MODEL: network})  # what PEFT would load otherwise than it was made is refused
    return PeftModel.from_pretrained(network, folder), scene
