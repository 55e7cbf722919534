"""LoRA3D: self-calibration of a pointmap network to one scene.

"LoRA3D: Low-Rank Self-Calibration of 3D Geometric Foundation Models" (arXiv 2412.07746). From about ten pictures,
without labels:

1. all pairs' pointmaps are aligned while every pixel is reweighted: the minimum of
   sum [ w e + mu (sqrt w - sqrt C)^2 ] over w at fixed geometry is  w = C / (1 + e / mu)^2,  which caps the influence
   of a confident outlier at C mu;
2. the aligned points chi, moved into each pair's first camera and kept where w > cutoff, are pseudo labels;
3. a LoRA adapter (y = W0 x + s B A x on the attention's q, k, v; rank 16, s = 1) learns them with DUSt3R's own loss.

C is log(conf) here: the network's confidence is always above 1, and the thresholds 0.5 and 1.5 apply to the log. The
first hundred steps are not reweighted: a small mu from step 0 would freeze a bad initialisation. Trained: A, B. Stored:
an ordinary PEFT LoRA with ``scene.json``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adapters import files
from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.peft_directory import write_directory
from adapters.layers.variant import read_layers
from adapters.progress import Monitor, Progress, Silent, check
from pipelines.geometry import alignment
from pipelines.geometry.alignment import Alignment, Reweight
from pipelines.geometry.images import Photo
from pipelines.geometry.inference import Predictions, precision
from pipelines.geometry.network import Encoded, Points
from pipelines.geometry.objective import confidence_loss
from pipelines.geometry.pairs import Pair
from pipelines.geometry.verification import Verified, verified

if TYPE_CHECKING:
    from peft import LoraConfig

METHOD = Method(
    name="lora3d",
    title="LoRA3D",
    summary="Calibrates a pointmap network to one scene on its own, robustly aligned predictions.",
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

SCENE = "scene.json"
"""File in an adapter's folder that records what it was calibrated on."""

ENTERS = 0.5
"""Pixels with a transformed confidence below this have weight 0."""

LEAST_KEPT = 0.05
"""An edge is left out if either of its views keeps less than this share of its pixels as labels."""
TOO_FEW, FALLBACK_KEPT = 0.2, 0.5
"""A cutoff that keeps less than the first share of all pixels is lowered to keep the second. Of 0.2, 0.4 and 0.6 the
larger was always better on the two rooms tried, which are not used for evaluation."""


# ------------------------------------------------------------------------------------------------ robust weights


def calibrated(confidence: Tensor, distance: Tensor, mu: float) -> Tensor:
    """w = C / (1 + e / mu)^2, and 0 where C is at most :data:`ENTERS`."""
    return torch.where(confidence > ENTERS, confidence / (1 + distance / mu) ** 2, 0.0)


def reweighting(mu: float, warmup: int = 100, every: int = 10) -> Reweight:
    """Reweighting for :func:`pipelines.geometry.alignment.align`, every ``every`` steps after ``warmup`` steps.

    Raises:
        InputError: ``mu`` is not positive.
    """
    if not mu > 0:
        raise InputError(f"mu must be above 0, got {mu}; 0.03 suits most scenes.")

    def update(step: int, confidence: Tensor, distance: Tensor) -> Tensor | None:
        if step < warmup:
            return torch.where(confidence > ENTERS, confidence, 0.0) if step == 0 else None
        return calibrated(confidence, distance, mu) if (step - warmup) % every == 0 else None

    return update


def robust_alignment(
    predictions: Predictions, mu: float = 0.03, warmup: int = 100, steps: int = 300, **options: Any
) -> Alignment:
    """Global alignment with calibrated confidence; ``weights`` of the result are those of the final geometry.

    Raises:
        InputError: as :func:`reweighting` and :func:`pipelines.geometry.alignment.align`.
    """
    scene = alignment.align(predictions, steps, reweight=reweighting(mu, warmup), **options)
    raw = torch.stack([predictions.confidence1, predictions.confidence2]).cpu()
    start = alignment.transformed(raw, options.get("transform", "log"))
    scene.weights = calibrated(start, scene.distances, mu)
    return scene


def shared(scene: Alignment, pairs: Sequence[Pair], wanted: Sequence[Pair]) -> Alignment:
    """The scene with weights for ``wanted`` pairs: a pixel's largest weight over all aligned ``pairs`` of its picture.

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
    """Pseudo labels of one scene: the point of every pixel, and in which ordered pairs it counts.

    Shapes: world ``(N, P, 3)``, poses ``(N, 4, 4)`` camera-to-world, focals ``(N,)``; valid ``(2, E, P)`` (view 1,
    view 2). ``kept`` is the share of pixels that count, by pair.
    """

    sizes: tuple[tuple[int, int], ...]
    pairs: tuple[Pair, ...]
    world: Tensor
    poses: Tensor
    focals: Tensor
    valid: Tensor
    cutoff: float
    kept: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def points(self, edge: int, side: int) -> Tensor:
        """Points ``(P, 3)`` of a pair's view, in the frame of the pair's first camera."""
        pose = self.poses[self.pairs[edge][0]]
        return (self.world[self.pairs[edge][side]] - pose[:3, 3]) @ pose[:3, :3]

    def to(self, device: Any) -> Labels:
        """Move the tensors."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _LABEL_TENSORS})

    def save(self, file: Path, **text: str) -> Path:
        """Write a safetensors file, with extra metadata ``text``; returns ``file``."""
        from safetensors.torch import save_file

        about = {name: value for name, value in vars(self).items() if name not in _LABEL_TENSORS}
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _LABEL_TENSORS}
        return files.write(file, lambda part: save_file(tensors, part, {"about": json.dumps(about), **text}))

    @classmethod
    def load(cls, file: Path) -> Labels:
        """Read a file written by :meth:`save`."""
        from safetensors import safe_open

        with safe_open(file, "pt") as kept:
            about = json.loads(kept.metadata()["about"])
            about |= {name: tuple(tuple(pair) for pair in about[name]) for name in ("sizes", "pairs")}
            return cls(**about, **{name: kept.get_tensor(name) for name in _LABEL_TENSORS})


_LABEL_TENSORS = ("world", "poses", "focals", "valid")


def pseudo_labels(scene: Alignment, pairs: Sequence[Pair], cutoff: float = 1.5) -> Labels:
    """Labels of all edges whose two views each keep at least 5 % of their pixels (w > ``cutoff``).

    If less than 20 % of all pixels are left, or fewer edges than images, the cutoff is lowered to keep half of the
    pixels, with a warning.

    Raises:
        InputError: the cutoff is not positive, the poses are degenerate, or no edge is left.
    """
    if not cutoff > 0:
        raise InputError(f"The cutoff must be above 0, got {cutoff}; 1.5 suits most scenes.")
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
    shares = {f"{pairs[e][0]}-{pairs[e][1]}": round(float(_share(scene, pairs, e, cutoff).mean()), 4)
              for e in range(len(pairs))}  # fmt: skip
    world = torch.stack([_world(scene, n) for n in range(len(scene.sizes))])
    return Labels(
        scene.sizes, tuple(pairs[e] for e in edges), world, scene.poses, scene.focals,
        scene.weights[:, edges] > cutoff, cutoff, shares, warnings,
    )  # fmt: skip


def scene_labels(scene: Alignment, seen: Verified, pairs: Sequence[Pair], cutoff: float = 1.5) -> Labels:
    """Labels for all ``pairs`` within a group of verified pairs, aligned or not, from points confirmed by any pair.

    Raises:
        InputError: as :func:`pseudo_labels`, or no two pictures are in one group.
    """
    wanted = seen.within(pairs)
    if not wanted:
        raise InputError(
            "No two pictures agree in colour where their points coincide: take pictures with more overlap, or "
            "calibrate without this check (--no-verify)."
        )
    return pseudo_labels(shared(scene, seen.predictions.pairs, wanted), wanted, cutoff)


def check_photos(photos: Sequence[Photo]) -> None:
    """Raise :class:`InputError` if there are fewer than three different pictures of a scene."""
    different = len({photo.sha256 for photo in photos})
    if different < 3:
        raise InputError(f"Calibration needs at least three different pictures of a scene, got {different}.")


def check_poses(scene: Alignment) -> None:
    """Raise :class:`InputError` if cameras or depth are not finite, or all cameras are in one place."""
    centres = scene.poses[:, :3, 3]
    if not scene.poses.isfinite().all() or not scene.depth.isfinite().all():
        raise InputError("The aligned cameras are not finite: these pictures cannot calibrate the model.")
    if still(scene):
        raise InputError(
            f"All {len(centres)} cameras are in the same place: identical pictures, or a rotation on the spot, show no "
            "depth to calibrate on."
        )


def still(scene: Alignment) -> bool:
    """Whether all cameras are within a thousandth of the typical depth of their mean position."""
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

    Attributes:
        preset: layers that get an adapter, see :data:`TARGETS`.
        batch: pairs per step.
        lr, final_lr: learning rate at the start and the end of its cosine.
        alpha: weight of the confidence term in the loss.
        dtype: precision of encoder and decoders.

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
            raise InputError("Rank, epochs and batch must be at least 1 and the learning rate above 0.")
        if self.preset not in TARGETS:
            raise InputError(f"Unknown preset '{self.preset}': use one of {', '.join(TARGETS)}.")


def adapted_layers(network: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers that a regular expression matches in full."""
    layers = (name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return [name for name in layers if re.fullmatch(pattern, name)]


def with_lora(network: nn.Module, rank: int = 16, preset: str = "paper-18mb", seed: int = 0) -> Any:
    """The network as a :class:`peft.PeftModel` with a fresh adapter (B = 0: nothing changes yet).

    Raises:
        InputError: the rank exceeds a layer's smaller side.
    """
    from peft import LoraConfig

    sides = [min(network.get_parameter(f"{name}.weight").shape) for name in adapted_layers(network, TARGETS[preset])]
    if rank < 1 or (sides and rank > min(sides)):
        raise InputError(f"The rank must be between 1 and {min(sides, default=1)} for this model, got {rank}.")
    return injected(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[preset], bias="none"), seed)


def injected(network: nn.Module, config: LoraConfig, seed: int = 0) -> Any:
    """The network with the adapter described by PEFT's configuration; A's initial values depend only on ``seed``."""
    from peft import get_peft_model

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return get_peft_model(network, config)
    finally:
        torch.random.set_rng_state(state)


Sample = tuple[int, int]
"""(scene, edge): one labelled pair."""


def samples_of(labels: Sequence[Labels]) -> list[Sample]:
    """All labelled pairs of all scenes."""
    return [(scene, edge) for scene, kept in enumerate(labels) for edge in range(len(kept.pairs))]


def epochs(
    samples: Sequence[Sample], labels: Sequence[Labels], size: int, seed: int = 0
) -> Iterator[list[list[Sample]]]:
    """Endless epochs as lists of batches: all ``samples`` shuffled, ``size`` pairs per batch.

    The pairs of a batch have pictures of equal sizes, so some batches are smaller. All epochs have as many batches.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        groups: dict[Any, list[Sample]] = {}
        out = []
        for scene, edge in (samples[k] for k in torch.randperm(len(samples), generator=generator).tolist()):
            i, j = labels[scene].pairs[edge]
            key = (labels[scene].sizes[i], labels[scene].sizes[j])
            groups.setdefault(key, []).append((scene, edge))
            if len(groups[key]) == size:
                out.append(groups.pop(key))
        yield out + list(groups.values())


def answers(
    model: Any, batch: Sequence[Sample], photos: Sequence[Sequence[Photo]], labels: Sequence[Labels]
) -> tuple[Points, Points]:
    """The network's predictions for a batch's pairs; a picture shared by several pairs is encoded once."""
    device = next(model.parameters()).device
    sides = [[(scene, labels[scene].pairs[edge][side]) for scene, edge in batch] for side in (0, 1)]
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for scene, n in dict.fromkeys(sides[0] + sides[1]):
        groups.setdefault(photos[scene][n].size, []).append((scene, n))
    encoded = {
        size: model.encode(torch.stack([photos[scene][n].pixels for scene, n in group]).to(device) * 2 - 1)
        for size, group in groups.items()
    }
    both = []
    for side in sides:
        size = photos[side[0][0]][side[0][1]].size  # equal within a side, see epochs
        index = torch.tensor([groups[size].index(key) for key in side], device=device)
        both.append(Encoded(encoded[size].tokens.index_select(0, index), encoded[size].grid))
    found: tuple[Points, Points] = model.decode(*both)
    return found


def targets_of(
    batch: Sequence[Sample], labels: Sequence[Labels], device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Target points ``(B, H, W, 3)`` and their masks ``(B, H, W)``, each for both views of a batch's pairs."""
    points, valid = [], []
    for side in (0, 1):
        scene, edge = batch[0]
        h, w = labels[scene].sizes[labels[scene].pairs[edge][side]]
        points.append(torch.stack([labels[s].points(e, side)[: h * w] for s, e in batch]).unflatten(1, (h, w)))
        valid.append(torch.stack([labels[s].valid[side, e, : h * w] for s, e in batch]).unflatten(1, (h, w)))
    return (points[0].to(device), points[1].to(device)), (valid[0].to(device), valid[1].to(device))


def cosine(step: int, steps: int, peak: float, floor: float) -> float:
    """Learning rate of ``step`` (from 0): half a cosine from ``peak``, which would reach ``floor`` at ``steps``."""
    least = floor / peak
    return peak * (least + (1 - least) * (0.5 * (1 + math.cos(math.pi * (step / steps)))))


def train_adapter(
    network: nn.Module, photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], recipe: Recipe,
    monitor: Monitor | None = None,
) -> tuple[Any, list[float]]:  # fmt: skip
    """Train an adapter on the labels of one or more scenes, in this process and without checkpoints.

    ``studio.training.tasks.scene`` does the same with checkpoints; on a CPU the results are identical.

    Returns:
        The PEFT model around ``network``, and the loss of every step.

    Raises:
        InputError: a loss that is not finite.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    monitor = monitor or Silent()
    model = with_lora(network, recipe.rank, recipe.preset, recipe.seed)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = learning[0].device
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(learning, lr=recipe.lr, weight_decay=0.01, fused=fused)
    plan = list(itertools.chain.from_iterable(
        itertools.islice(epochs(samples_of(labels), labels, recipe.batch, recipe.seed), recipe.epochs)
    ))  # fmt: skip
    losses: list[float] = []
    for step, batch in enumerate(plan):
        check(monitor)
        optimizer.param_groups[0]["lr"] = cosine(step, len(plan), recipe.lr, recipe.final_lr)
        with precision(device, recipe.dtype):
            predicted = answers(model, batch, photos, labels)
        loss = confidence_loss(predicted, *targets_of(batch, labels, device), recipe.alpha)
        if not loss.isfinite():
            raise InputError(f"The loss of step {step} is not finite: lower the learning rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        monitor.report(Progress("calibrate", step + 1, len(plan), loss=losses[-1]))
    return model, losses


Train = Callable[
    [nn.Module, Sequence[Sequence[Photo]], Sequence[Labels], Recipe, Monitor | None], tuple[Any, list[float]]
]
"""Trains an adapter on labels, as :func:`train_adapter` does."""


def labelled(
    photos: Sequence[Sequence[Photo]], predictions: Sequence[Predictions], mu: float = 0.03, warmup: int = 100,
    cutoff: float = 1.5, steps: int = 300, transform: str = "log", verify: bool = True, share: bool = True,
    monitor: Monitor | None = None,
) -> tuple[list[Alignment], list[Labels]]:  # fmt: skip
    """The robust alignments and the labels of one or more scenes; see :func:`calibrate`."""
    scenes, labels = [], []
    for pictures, predicted in zip(photos, predictions, strict=True):
        seen = verified(predicted, pictures) if verify else Verified(predicted, [list(range(len(pictures)))], [])
        scene = robust_alignment(seen.predictions, mu, warmup, steps, transform=transform, monitor=monitor or Silent())
        found = scene_labels(scene, seen, predicted.pairs, cutoff) if share else pseudo_labels(
            scene, seen.predictions.pairs, cutoff
        )  # fmt: skip
        found.warnings[:0] = [f"Labels: {text}" for text in seen.warnings]
        scenes.append(scene)
        labels.append(found)
    return scenes, labels


def calibrate(
    network: nn.Module, photos: Sequence[Sequence[Photo]], predictions: Sequence[Predictions], recipe: Recipe,
    mu: float = 0.03, warmup: int = 100, cutoff: float = 1.5, steps: int = 300, transform: str = "log",
    verify: bool = True, share: bool = True, train: Train = train_adapter, monitor: Monitor | None = None,
) -> tuple[Any, list[Alignment], list[Labels], list[float]]:  # fmt: skip
    """Self-calibration to one or more scenes: align robustly, label, train.

    Args:
        network: the base; it is wrapped, its own weights do not change.
        photos, predictions: one entry per scene.
        recipe: of the training.
        mu, warmup, steps, transform: of the robust alignment.
        cutoff: weight above which a pixel is a label.
        verify: leave pairs whose pictures contradict each other out of the alignment.
        share: a point confirmed by one pair is a label in every pair of its picture; if False, only in pairs that
            confirm it themselves, as in the paper.
        train: trains the adapter.
        monitor: receives progress and may cancel.

    Returns:
        The PEFT model, the robust alignments, the labels and the training losses.

    Raises:
        InputError: as :func:`robust_alignment`, :func:`scene_labels` and :func:`train_adapter`.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    scenes, labels = labelled(
        photos, predictions, mu, warmup, cutoff, steps, transform, verify, share, monitor
    )  # fmt: skip
    model, losses = train(network, photos, labels, recipe, monitor)
    return model, scenes, labels, losses


def facts_of(
    base: Mapping[str, str], photos: Sequence[Sequence[Photo]], labels: Sequence[Labels], losses: Sequence[float]
) -> dict[str, Any]:
    """Contents of ``scene.json``; the first scene is the reconstructed one.

    Args:
        base: name, sha256 and licence of the weights.
        photos, labels: one entry per scene.
        losses: of every training step.
    """
    scenes: list[dict[str, Any]] = [
        {"images": [photo.facts() for photo in pictures], "cutoff": kept.cutoff, "kept": kept.kept,
         "warnings": kept.warnings, "poses": kept.poses.tolist(), "focals": kept.focals.tolist()}
        for pictures, kept in zip(photos, labels, strict=True)
    ]  # fmt: skip
    return {"base": dict(base), "transform": "log", "losses": list(losses), **scenes[0], "also": scenes[1:]}


def save_adapter(model: Any, folder: Path, scene: Mapping[str, Any]) -> Path:
    """Write an ordinary PEFT adapter with ``scene.json``, as a whole or not at all; returns ``folder``."""
    with files.whole(folder) as part:
        part.mkdir()
        write_directory(part, read_layers(model))
        files.write_text(part / SCENE, json.dumps(scene, indent=1))
    return folder


def load_adapter(network: nn.Module, folder: Path, base_sha256: str = "") -> tuple[Any, dict[str, Any]]:
    """Load a saved adapter onto its base; returns the PEFT model and the contents of ``scene.json``.

    Raises:
        InputError: there is no adapter, it was made for another base, its shapes do not fit, or it is not supported.
    """
    from peft import PeftModel

    from adapters.formats import read
    from adapters.formats.fit import fit
    from adapters.formats.lora import MODEL

    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"'{folder}' contains no PEFT adapter (adapter_config.json is missing).")
    file = folder / SCENE
    try:
        scene = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        scene = None
    if not isinstance(scene, dict):
        raise InputError(f"'{file}' is damaged: delete it to use the adapter without it.")
    wanted = scene.get("base", {}).get("sha256", "")
    if wanted and base_sha256 and wanted != base_sha256:
        raise InputError(
            f"The adapter '{folder.name}' was made for another base ({scene['base'].get('name', wanted[:12])}): "
            "use that base."
        )
    fit(read(folder), {MODEL: network})  # refuses what PEFT would load differently from how it was made
    return PeftModel.from_pretrained(network, folder), scene
