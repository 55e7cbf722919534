"""ICM-LoRA: In-Context Meta LoRA Generation, arXiv 2501.17635 (IJCAI 2025).

One generator instead of many stored LoRAs. Snapshots from the end of each task's training are vectors x in R^D
(:mod:`adapters.generation.flat_lora`), normalised per tensor; a task is a vector c in R^d, the mean last hidden state
of some of its examples, standardised over the tasks. A conditional VAE (:mod:`adapters.generation.conditional_vae`)
learns

    loss = mean_j (f(mu + exp(logvar / 2) e, c)_j - x_j)^2 + weight sum_j max(KL_j, free_bits),    e ~ N(0, I)

and z ~ N(0, T^2 I) with a task's vector gives f(z, c), de-normalised and cut into A and B: an ordinary LoRA. The weight
rises linearly over the first ``warm_up`` steps.

What differs from the authors' program, which trains one generator per task and rank: one generator learns all tasks,
every batch mixes them (each task equally often); terms are in one gauge; the mean and standard deviation of each tensor
are the training set's and stored in the generator ("dataset"), while the program takes them from a real LoRA of the
wanted task ("reference", still possible); padding is not part of the loss; the cosine schedule ends at 0.

The layout ``conv`` is theirs and needs thousands of epochs; ``mlp`` is for small D. A generator knows the tasks it has
seen: what it makes for another one has to be measured. A collapsed generator makes the mean LoRA for every task;
``Generator.figures`` compares each task's LoRA with that mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from adapters import files
from adapters.catalogue import Method
from adapters.errors import Cancelled, InputError, nearest
from adapters.formats.lora import RECIPE_ENTRY, LoraFile
from adapters.formats.tensors import check_finite, load_pickle, read_tensors, write_tensors
from adapters.generation.conditional_vae import ConditionalVae, build, kl, parameters
from adapters.generation.flat_lora import LoraCodec, in_gauge
from adapters.generation.settings import Settings
from adapters.progress import Monitor, Progress, Silent

METHOD = Method(
    name="icm-lora",
    title="ICM-LoRA",
    summary="Learns a generator from snapshots of several tasks' LoRAs; it makes the LoRA of a task from its vector.",
    stage="generation",
    makes="ordinary LoRA",
    paper="In-Context Meta LoRA Generation, arXiv 2501.17635",
    entry="adapters.generation.icm_lora:fit",
)

ENTRY = "adapter_studio_icm_lora"
"""Metadata entry of a generator file: everything but the tensors, as JSON."""

BYTES = 16
"""Memory per parameter in training: weight, gradient, two moments, in fp32."""


@dataclass(eq=False)
class Generator:
    """A trained generator.

    Attributes:
        codec: layers and base of the LoRAs it makes.
        network: in evaluation mode.
        tasks: task -> vector c (d,) as it was given.
        condition: mean and standard deviation of c over the tasks, (2, d).
        statistics: mean and standard deviation of each tensor, (2, tensors); None for "reference".
        figures: of the training: the last MSE and KL (sum over z), parameters of the network and of one LoRA,
            snapshots, and per task the relative L2 distance from the mean of its snapshots of the generated LoRA
            (z = 0; "error") and of the mean over all tasks ("mean_error").
        first: the LoRA (D,) that terms were aligned with, for "reference" with the gauge "aligned"; otherwise None.
    """

    codec: LoraCodec
    settings: Settings
    network: ConditionalVae
    tasks: dict[str, Tensor]
    condition: Tensor
    statistics: Tensor | None
    figures: dict[str, Any]
    first: Tensor | None = None

    def generate(
        self,
        task: str | Tensor,
        seed: int = 0,
        temperature: float = 1.0,
        reference: LoraFile | None = None,
        base: str = "",
        digest: str = "",
    ) -> LoraFile:
        """The LoRA of a task.

        Args:
            task: name of a task of the training, or the vector (d,) of any.
            seed: of z; the same seed gives the same LoRA.
            temperature: standard deviation of z; 0 is the mean LoRA of the task.
            reference: with normalise "reference": the LoRA whose statistics are taken.
            base, digest: name and digest of the weights of the base that it will be used with, if that should be
                checked; digests decide where both are known.

        Raises:
            InputError: an unknown task, a vector of another width or not finite, no or a needless reference.
            FamilyError: another base than that of the snapshots.
        """
        self.codec.check_base(base, digest, "The wanted adapter")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise InputError(f"temperature must be a finite number, not negative, got {temperature}.")
        c = self.vector(task)
        statistics = self._statistics(reference)
        g = torch.Generator().manual_seed(seed)
        z = temperature * torch.randn(1, self.settings.latent, generator=g)
        self.network.eval()
        device = next(self.network.parameters()).device
        with torch.no_grad():
            x = self.network.decode(z.to(device), standardised(c, self.condition)[None].to(device))[0].cpu()
        told = {"method": "icm-lora", "seed": seed, "temperature": temperature} | (
            {"task": task} if isinstance(task, str) else {}
        )
        metadata = {"generated_by": json.dumps(told)}
        if self.codec.origin:
            metadata[RECIPE_ENTRY] = json.dumps({"version": 1, "job": "icm-lora", "base": dict(self.codec.origin)})
        return self.codec.unflatten(denormalised(x, statistics, self.codec), metadata)

    def vector(self, task: str | Tensor) -> Tensor:
        """c (d,) of a task by name, or the vector itself after a check.

        Raises:
            InputError: see :meth:`generate`.
        """
        if isinstance(task, str):
            if task not in self.tasks:
                raise InputError(
                    f"The generator has no task '{task}'{nearest(task, self.tasks)}: it knows {', '.join(self.tasks)}. "
                    "Give the vector of a new one."
                )
            return self.tasks[task]
        _check_vector(task, self.condition.shape[1], "The task's vector")
        return task.detach().cpu().float()

    def _statistics(self, reference: LoraFile | None) -> Tensor:
        if self.statistics is not None:
            if reference is not None:
                raise InputError("The generator has statistics of its own: leave the reference out.")
            return self.statistics
        if reference is None:
            raise InputError(
                "The generator was trained with normalise 'reference': give a LoRA of the task whose statistics are "
                "taken, or train it with 'dataset'."
            )
        self.codec.check(reference, "The reference")
        first = None if self.first is None else self.codec.unflatten(self.first)
        made = in_gauge(reference, self.settings.gauge, first)
        return tensor_statistics(self.codec.flatten(made)[None], self.codec)

    def save(self, path: Path) -> Path:
        """Write one .safetensors file; returns its path."""
        if path.suffix != ".safetensors":
            raise InputError(f"A generator is a .safetensors file, got '{path.name}'.")
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {"condition": self.condition, "tasks": torch.stack(list(self.tasks.values()))}
        if self.statistics is not None:
            tensors["statistics"] = self.statistics
        if self.first is not None:
            tensors["first"] = self.first
        head = {"version": 1, "codec": self.codec.to_dict(), "settings": asdict(self.settings),
                "tasks": list(self.tasks), "figures": self.figures}  # fmt: skip
        return write_tensors(path, tensors, {ENTRY: json.dumps(head)})

    @classmethod
    def load(cls, path: Path) -> Generator:
        """Read a generator file.

        Raises:
            InputError: the file is missing, damaged, or no generator of this version.
        """
        tensors, metadata = read_tensors(path)
        if ENTRY not in metadata:
            raise InputError(f"'{path}' is no generator: make one with  studio generate train.")
        check_finite(tensors, f"'{path}'")
        try:
            head = json.loads(metadata[ENTRY])
            if head["version"] != 1:
                raise ValueError(f"version {head['version']} instead of 1")
            codec = LoraCodec.from_dict(head["codec"])
            settings = Settings(**{name: head["settings"][name] for name in (one.name for one in fields(Settings))})
            names, condition, tasks = list(head["tasks"]), tensors["condition"], tensors["tasks"]
            statistics = tensors["statistics"] if settings.normalise == "dataset" else None
            count = len(list(codec.tensors()))
            if tasks.shape != (len(names), condition.shape[1]) or (
                statistics is not None and statistics.shape != (2, count)
            ):
                raise ValueError("tensors of other sizes than it says")
            with torch.device("meta"):
                network = build(settings.arch, codec.size, condition.shape[1], settings.latent, settings.hidden)
            own = {name.removeprefix("network."): one for name, one in tensors.items() if name.startswith("network.")}
            network.load_state_dict(own, strict=True, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"'{path}' is damaged, or no generator of this version: {reason}") from None
        network.eval().requires_grad_(False)
        return cls(codec, settings, network, dict(zip(names, tasks, strict=True)), condition, statistics,
                   dict(head.get("figures") or {}), tensors.get("first"))  # fmt: skip


# ------------------------------------------------------------------------------------------------ vectors


def tensor_statistics(x: Tensor, codec: LoraCodec) -> Tensor:
    """Mean and standard deviation of each tensor over all rows of x (n, D): (2, tensors).

    Raises:
        InputError: a tensor that is constant, with its name.
    """
    found = []
    for part, (name, _) in zip(x.split([length for _, length in codec.tensors()], 1), codec.tensors(), strict=True):
        mean, std = part.double().mean(), part.double().std(correction=0)
        if not float(std) > 0:
            raise InputError(
                f"'{name}' has one value throughout ({float(mean):g}), so there is nothing to learn in it: use "
                "snapshots from the end of a training (B is zero at its start), or leave that layer out of it."
            )
        found.append(torch.stack([mean, std]))
    return torch.stack(found, 1).float()


def normalised(x: Tensor, statistics: Tensor, codec: LoraCodec) -> Tensor:
    """(x - mean) / std, per tensor; x (..., D)."""
    mean, std = _spread(statistics, codec)
    return (x - mean) / std


def denormalised(x: Tensor, statistics: Tensor, codec: LoraCodec) -> Tensor:
    """x std + mean, per tensor; x (..., D)."""
    mean, std = _spread(statistics, codec)
    return x * std + mean


def _spread(statistics: Tensor, codec: LoraCodec) -> Tensor:
    lengths = torch.tensor([length for _, length in codec.tensors()])
    return statistics.repeat_interleave(lengths, 1)


def standardised(c: Tensor, condition: Tensor) -> Tensor:
    """(c - mean) / std over the tasks; entries that all tasks share become 0."""
    mean, std = condition
    return torch.where(std > 0, (c - mean) / std.clamp_min(1e-12), torch.zeros_like(c))


def task_vector(
    model: Any,
    tokenizer: Any,
    examples: Sequence[str],
    layer: int = -1,
    position: Literal["last", "mean"] = "last",
    monitor: Monitor | None = None,
    shots: int = 0,
) -> Tensor:
    """The vector c (d,) of a task: the mean hidden state over its examples, in fp32.

    Args:
        model: a transformers model; the base, so that the vector exists before any LoRA of the task, or the base with
            one (as in the authors' program).
        examples: texts of the task, in the form in which it is asked later (with the same chat template).
        layer: which hidden state; -1 is the last, 0 the embeddings.
        position: "last" token of each text, or the "mean" over its tokens.
        monitor: receives progress per example and may cancel.
        shots: how many other examples stand before each one (the paper's in-context prompts), a line each.

    Raises:
        InputError: no example, an empty one, no such layer, or not enough examples for the shots.
        Cancelled: the monitor asked to stop.
    """
    monitor = monitor or Silent()
    if not examples:
        raise InputError("A task's vector needs at least one example.")
    training, total, device = model.training, torch.zeros(()), next(model.parameters()).device
    model.eval()
    try:
        for number, text in enumerate(with_shots(examples, shots)):
            _stop(monitor)
            inputs = tokenizer(text, return_tensors="pt").to(device)
            if not inputs["input_ids"].shape[1]:
                raise InputError(f"Example {number + 1} of the task is empty.")
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states
            if not -len(states) <= layer < len(states):
                raise InputError(f"The model has hidden states 0 to {len(states) - 1}, got the layer {layer}.")
            h = states[layer][0].float().cpu()
            total = total + (h[-1] if position == "last" else h.mean(0))
            monitor.report(Progress("task vector", number + 1, len(examples)))
    finally:
        model.train(training)
    return total / len(examples)


def with_shots(examples: Sequence[str], shots: int) -> list[str]:
    """Each example after the ``shots`` that precede it (the last ones precede the first), a line each.

    Raises:
        InputError: a negative number, or not enough examples.
    """
    if not 0 <= shots < max(1, len(examples)):
        raise InputError(f"shots must be 0 to {max(0, len(examples) - 1)} with {len(examples)} examples, got {shots}.")
    return ["\n".join(examples[i - k] for k in range(shots, -1, -1)) for i in range(len(examples))]


def _check_vector(c: Tensor, width: int, label: str) -> None:
    if c.shape != (width,):
        raise InputError(f"{label} has the shape {tuple(c.shape)}, expected ({width},).")
    if not bool(c.isfinite().all()):
        raise InputError(f"{label} holds values that are not finite.")


def _stop(monitor: Monitor) -> None:
    if monitor.cancelled():
        raise Cancelled("Stopped on request.")


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True, eq=False)
class _Data:
    """Snapshots as vectors x (n, D), the rows of each task, and what brings vectors back."""

    codec: LoraCodec
    raw: Tensor
    x: Tensor
    rows: tuple[range, ...]
    c: Tensor
    condition: Tensor
    statistics: Tensor | None

    def fingerprint(self, settings: Settings) -> str:
        """A digest of everything that decides the training's course."""
        digest = hashlib.sha256(json.dumps([asdict(settings), self.codec.to_dict()], sort_keys=True).encode())
        for tensor in (self.x, self.c):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr(self.rows).encode())
        return digest.hexdigest()


def fit(
    snapshots: Mapping[str, Sequence[LoraFile]],
    vectors: Mapping[str, Tensor],
    settings: Settings | None = None,
    monitor: Monitor | None = None,
    checkpoint: Path | None = None,
    save_every: int = 100,
    device: str = "cpu",
    memory: int | None = None,
) -> Generator:
    """Train a generator.

    Args:
        snapshots: task -> LoRAs from the end of its training, all of the same shapes and base.
        vectors: task -> vector c (d,).
        monitor: receives loss, MSE and KL per step; may cancel, after which the checkpoint is written.
        checkpoint: file with the state, written every ``save_every`` steps; a training found there goes on, exactly
            (on one machine).
        device: where the network is trained.
        memory: bytes that the training may take; None = what is free on this machine.

    Raises:
        InputError: fewer than 2 tasks (unless ``single_task``) or 2 snapshots of a task, snapshots that differ in
            layers, shape, rank or alpha, values that are not finite, a constant tensor, vectors of different widths,
            too little memory, a checkpoint of another training, or a loss that is not finite.
        FamilyError: snapshots of different bases.
        Cancelled: the monitor asked to stop.
    """
    settings, monitor = settings or Settings(), monitor or Silent()
    _check_tasks(snapshots, vectors, settings)
    first = next(iter(snapshots.values()))[0]
    codec = LoraCodec.of(first)
    width = next(iter(vectors.values())).numel()
    _check_memory(settings, codec, width, sum(map(len, snapshots.values())), memory)
    data = _data(snapshots, vectors, settings, codec)
    network, last = _train(data, settings, monitor, checkpoint, save_every, device)
    made = Generator(
        codec, settings, network, {name: vectors[name].detach().cpu().float() for name in snapshots}, data.condition,
        data.statistics, {}, data.raw[0] if data.statistics is None and settings.gauge == "aligned" else None,
    )  # fmt: skip
    made.figures = {**last, **_figures(made, data)}
    return made


def loss(
    network: ConditionalVae, x: Tensor, c: Tensor, noise: Tensor, weight: float, free_bits: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, MSE, KL summed over z) of a batch x (n, D), c (n, d) with noise (n, latent)."""
    decoded, mu, logvar = network(x, c, noise)
    mse = functional.mse_loss(decoded, x)
    divergence = kl(mu, logvar).mean(0)
    return mse + weight * divergence.clamp_min(free_bits).sum(), mse, divergence.sum()


def _train(
    data: _Data, settings: Settings, monitor: Monitor, checkpoint: Path | None, save_every: int, device: str
) -> tuple[ConditionalVae, dict[str, float]]:
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        network = build(s.arch, data.codec.size, data.c.shape[1], s.latent, s.hidden)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), s.learning_rate)
    fingerprint, start, last = data.fingerprint(s), 0, {"mse": 0.0, "kl": 0.0}
    if checkpoint is not None and checkpoint.is_file():
        kept = load_pickle(checkpoint)
        if not isinstance(kept, dict) or kept.get("fingerprint") != fingerprint:
            raise InputError(
                f"'{checkpoint}' belongs to another training (other settings or snapshots): remove it, or start in "
                "another folder."
            )
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        start, last = int(kept["step"]), dict(kept["last"])

    def save(step: int) -> None:
        if checkpoint is not None:
            state = {"fingerprint": fingerprint, "network": network.state_dict(), "step": step, "last": last,
                     "optimizer": optimizer.state_dict()}  # fmt: skip
            files.write(checkpoint, lambda part: torch.save(state, part))

    network.train()
    for step in range(start, s.steps):
        if monitor.cancelled():
            save(step)
            raise Cancelled("Stopped on request.")
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * (1 + math.cos(math.pi * step / s.steps)) / 2
        index, task, noise = _batch(data, s, step)
        weight = s.kld_weight * min(1.0, (step + 1) / s.warm_up if s.warm_up else 1.0)
        value, mse, divergence = loss(
            network, data.x[index].to(device), data.c[task].to(device), noise.to(device), weight, s.free_bits
        )
        if not math.isfinite(value.item()):
            raise InputError(f"The loss is no longer finite at step {step + 1}: lower the learning rate.")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        last = {"mse": mse.item(), "kl": divergence.item()}
        monitor.report(Progress("training", step + 1, s.steps, loss=value.item(), metrics=last))
        if (step + 1) % save_every == 0 and step + 1 < s.steps:
            save(step + 1)
    network.eval().requires_grad_(False)
    return network.to("cpu"), last


def untold(figures: Mapping[str, Any]) -> list[str]:
    """The tasks whose LoRA is hardly nearer to their own snapshots than the mean LoRA of all tasks.

    Args:
        figures: :attr:`Generator.figures`.
    """
    tasks = figures["tasks"]
    return [name for name, own in tasks.items() if len(tasks) > 1 and own["error"] > own["mean_error"] / 2]


def _batch(data: _Data, settings: Settings, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their tasks and the noise of a step, which depend on seed and step only; tasks count equally."""
    g = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    task = torch.randint(len(data.rows), (settings.batch,), generator=g)
    draws = torch.rand(settings.batch, generator=g, dtype=torch.float64)
    index = [data.rows[t].start + int(u * len(data.rows[t])) for t, u in zip(task.tolist(), draws, strict=True)]
    return torch.tensor(index), task, torch.randn(settings.batch, settings.latent, generator=g)


def _data(
    snapshots: Mapping[str, Sequence[LoraFile]], vectors: Mapping[str, Tensor], settings: Settings, codec: LoraCodec
) -> _Data:
    reference: LoraFile | None = None
    flat: list[Tensor] = []
    rows: list[range] = []
    for name, own in snapshots.items():
        rows.append(range(len(flat), len(flat) + len(own)))
        for number, file in enumerate(own):
            codec.check(file, f"Snapshot {number + 1} of '{name}'")
            made = in_gauge(file, settings.gauge, reference)
            reference = reference or made
            flat.append(codec.flatten(made))
    raw = torch.stack(flat)
    if settings.normalise == "dataset":
        statistics = tensor_statistics(raw, codec)
        x = normalised(raw, statistics, codec)
    else:
        statistics = None
        x = torch.stack([normalised(one, tensor_statistics(one[None], codec), codec) for one in raw])
    c = torch.stack([vectors[name].detach().cpu().float() for name in snapshots])
    condition = torch.stack([c.mean(0), c.std(0, correction=0)])
    return _Data(codec, raw, x, tuple(rows), standardised(c, condition), condition, statistics)


def _figures(made: Generator, data: _Data) -> dict[str, Any]:
    means = {name: data.raw[rows.start : rows.stop].mean(0) for name, rows in zip(made.tasks, data.rows, strict=True)}
    middle = torch.stack(list(means.values())).mean(0)
    tasks = {}
    for (name, mean), rows in zip(means.items(), data.rows, strict=True):
        statistics = made.statistics
        if statistics is None:
            statistics = tensor_statistics(data.raw[rows.stop - 1][None], data.codec)
        with torch.no_grad():
            c = standardised(made.tasks[name], made.condition)[None]
            x = made.network.decode(torch.zeros(1, made.settings.latent), c)[0]
        size = float(mean.norm())
        tasks[name] = {
            "error": float((denormalised(x, statistics, data.codec) - mean).norm()) / size,
            "mean_error": float((middle - mean).norm()) / size,
        }
    return {
        "parameters": sum(one.numel() for one in made.network.parameters()),
        "adapter_parameters": data.codec.size,
        "snapshots": len(data.raw),
        "tasks": tasks,
    }


def _check_tasks(
    snapshots: Mapping[str, Sequence[LoraFile]], vectors: Mapping[str, Tensor], settings: Settings
) -> None:
    if len(snapshots) < (1 if settings.single_task else 2):
        raise InputError(
            f"A generator learns from two tasks or more, got {len(snapshots)}: one alone has no condition to tell it "
            "from others (single_task allows it)."
        )
    for name, own in snapshots.items():
        if len(own) < 2:
            raise InputError(f"The task '{name}' has {len(own)} snapshots; it needs 2 or more, better 20.")
    if odd := sorted(snapshots.keys() ^ vectors.keys()):
        raise InputError(f"Every task needs snapshots and a vector; '{odd[0]}' has only one of them.")
    width = next(iter(vectors.values())).numel()
    for name, vector in vectors.items():
        _check_vector(vector, width, f"The vector of the task '{name}'")


def _check_memory(settings: Settings, codec: LoraCodec, width: int, count: int, memory: int | None) -> None:
    """Refuse a training larger than ``memory`` bytes."""
    if memory is None:
        import psutil

        memory = int(psutil.virtual_memory().available)
    number = parameters(settings.arch, codec.size, width, settings.latent, settings.hidden)
    needed = BYTES * number + 8 * codec.size * (count + settings.batch)
    if needed > memory:
        smaller = "use arch 'conv', a smaller hidden width" if settings.arch == "mlp" else "use a machine with more"
        raise InputError(
            f"LoRAs of {codec.size:,} parameters need a network of {number:,} and {needed / 2**30:.1f} GiB of memory; "
            f"{memory / 2**30:.1f} GiB are free: {smaller}, or LoRAs of a lower rank or fewer layers."
        )
