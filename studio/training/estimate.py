"""Estimates the memory and time of a training before any weight is read: of pictures, of text, of distillation.

The base is built on torch's "meta" device from its configuration files, the adapter is injected, and one forward and
backward pass runs there: this counts parameters, the tensors kept for the backward pass and the floating-point
operations exactly, without memory and in a moment. Only the speed of the device is measured, by a short multiplication.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.compression import backends
from adapters.compression.structure import Pruning, read_pruning
from adapters.errors import InputError
from studio.schema import JobConfig
from studio.training.schemas.distill import DistillConfig
from studio.training.schemas.image import TrainImageConfig
from studio.training.schemas.language import TrainLanguageConfig

Config = TrainImageConfig | TrainLanguageConfig | DistillConfig

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

STATES = {"adamw": 8, "adamw8bit": 2, "adafactor": 4, "sgd": 4, "prodigy": 16, "schedulefree-adamw": 8}
"""Bytes that an optimiser keeps per learnt number."""

OVERHEAD = {"cpu": 2e-5, "cuda": 1e-5, "mps": 2e-5}
"""Minimum seconds per operation, by kind of device; small models are limited by this."""

EFFICIENCY = 0.5
"""Share of the speed of one large multiplication that a whole network reaches."""


@dataclass(frozen=True)
class Work:
    """The cost of one forward and backward pass over a batch.

    Attributes:
        parameters: frozen numbers of every part of the base.
        learnt: numbers of the adapter.
        kept: bytes that the forward pass keeps for the backward pass.
        flops: floating-point operations of both passes.
        operations: the number of torch operations.
        denoiser: name of the part that is never offloaded.
        remark: a sentence on what is trained, if there is something to say.
        few: of its numbers, those that are stored in few bits.
        few_bytes: bytes of those.
        first: passes before the first step, as (how many, floating-point operations, operations) of one.
        held: bytes of data that stay in main memory.
        samples: of one pass over the data, if they were counted.
    """

    parameters: Mapping[str, int]
    learnt: int
    kept: int
    flops: float
    operations: int
    denoiser: str
    remark: str = ""
    few: int = 0
    few_bytes: int = 0
    first: tuple[int, float, int] = (0, 0.0, 0)
    held: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose, and seconds of the training steps (without loading, caching and samples); a remark, if any.

    ``recording``: those of the seconds in which trajectories are recorded before the first step.
    """

    memory: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    remark: str = ""
    recording: float = 0.0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        more: dict[str, Any] = {"remark": self.remark} if self.remark else {}
        if self.recording:
            more["seconds_recording"] = self.recording
        return {"memory": dict(self.memory), "memory_total": self.total, "seconds": self.seconds, **more}


def estimate(work: Work, config: Config, dtype: str, device: str, speed: float) -> Estimate:
    """Memory and time of a whole run.

    Args:
        dtype: "fp32", "fp16" or "bf16": of the frozen weights that are not stored in few bits.
        device: "cpu", "cuda" or "mps".
        speed: floating-point operations per second of a large multiplication (:func:`measured_speed`).
    """
    # Encoders are in main memory once their output is cached.
    resting = getattr(config, "memory", "none") != "none" and device != "cpu"
    frozen = {name: count for name, count in work.parameters.items() if name == work.denoiser or not resting}
    memory = {
        "base": (sum(frozen.values()) - work.few) * BYTES[dtype] + work.few_bytes,
        "adapter": work.learnt * (4 + 4 + (4 if config.ema else 0)),  # weights, gradients, running average
        "optimiser": work.learnt * STATES[config.optimizer],
        "activations": work.kept,
    }
    if work.held and device == "cpu":
        memory["trajectories"] = work.held
    passes = steps(config, samples=work.samples) * config.gradient_accumulation
    recording, learning = (
        times * (flops / (speed * EFFICIENCY) + operations * OVERHEAD[device])
        for times, flops, operations in (work.first, (passes, work.flops, work.operations))
    )
    return Estimate(memory, recording + learning, work.remark, recording)


def steps(config: Config, pictures: int | None = None, samples: int = 0) -> int:
    """Optimiser steps of the run; those of its ``epochs`` as if all data had one size.

    Args:
        pictures: how many pictures there are; None: those of the folder.
        samples: of one pass over the data; 0: counted here.
    """
    if isinstance(config, DistillConfig) or not config.epochs:
        return config.steps
    from studio.training import ready
    from studio.training.language import rows

    if isinstance(config, TrainLanguageConfig):
        samples = samples or len(rows.read(config).shown)
    elif not samples:
        count = len(ready.read_folder(config).pictures) if pictures is None else pictures
        samples = (count - ready.kept_out(count, config.validation_split)) * config.repeats
    return math.ceil(config.epochs * samples / (config.batch_size * config.gradient_accumulation))


def look(config: TrainImageConfig, dtype: str) -> Work:
    """Count the cost of one step of ``config``.

    Raises:
        InputError: the base is a single file or a hub id, so its parts cannot be built from configurations alone.
    """
    import torch

    from studio.training.inject import inject, lora_config

    family, counts, few = _base(config, dtype)
    encoders = family.text_encoders if config.train_text_encoder else {}
    with torch.device("meta"):
        for name, model in {family.denoiser_name: family.denoiser, **encoders}.items():
            inject(model, lora_config(model, config, name in encoders, family.about.targets))
        step = _step(family, config, encoders, _inputs(family, config, bool(encoders), _kind(dtype)))
    return Work(counts, *step, family.denoiser_name, "", *few)


def look_at_distillation(config: DistillConfig, dtype: str) -> Work:
    """As :func:`look`, with the teacher's passes: in each step, and those that record its trajectories before.

    Raises:
        InputError: as :func:`look`; or a style is missing or does not fit the base.
    """
    import torch

    from pipelines.diffusion.distillation import embedding, trajectories
    from pipelines.diffusion.distillation.student import Student
    from studio.training.inject import ADAPTER, inject, lora_config
    from studio.training.teacher import styles_attached

    training = config.training()
    family, counts, few = _base(training, dtype)
    denoiser, meta = family.denoiser, torch.device("meta")
    with ExitStack() as stack:
        stack.enter_context(styles_attached(config, family, meta))
        stack.enter_context(meta)
        inject(denoiser, lora_config(denoiser, training, False, family.about.targets))
        noisy, times, given = _inputs(family, training, False, _kind(dtype))
        batch = len(noisy)
        if config.guidance_mode == "embedding":
            embedding.add_projection(denoiser)
            given = given | {"guidance": torch.empty(batch, embedding.WIDTH)}
        student = Student(denoiser, ADAPTER)
        if config.guidance_mode == "strength":
            student.set_strength(torch.ones(batch))

        @torch.no_grad()
        def ask(rows: int) -> None:
            """A pass of ``rows`` samples."""
            inputs = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in given.items()}
            family.predict(denoiser, noisy[:1].expand(rows, *noisy.shape[1:]), times[:1].expand(rows), inputs)

        def taught() -> None:
            """The passes of one step that nothing learns from directly."""
            if config.states == "data":
                with student.off():
                    ask(2 * batch)  # with and without the prompt
            if config.objective == "consistency":
                ask(batch)  # the student, one knot further

        step = _step(family, training, {}, (noisy, times, given), taught)
        student.set_strength(None)
        with student.off(), _counting() as teacher:
            ask(2 * trajectories.PART)
    if config.states == "data":
        return Work(counts, *step, family.denoiser_name, "", *few)
    parts = range(math.ceil(config.trajectory_count / trajectories.PART))
    place = Path(config.trajectories.strip()).expanduser()
    reused = sum(trajectories.part_file(place, part).is_file() for part in parts) if config.trajectories.strip() else 0
    first = ((len(parts) - reused) * config.knots, teacher.flops, teacher.operations)
    held = 2 * 2 * config.trajectory_count * config.knots * noisy[0].numel()  # states and predictions, in fp16
    return Work(counts, *step, family.denoiser_name, "", *few, first, held)


def stored(model: Any, quantization: str, file: str = "", skip: Collection[str] = ()) -> tuple[int, int]:
    """Numbers of a model that are stored in few bits, and their bytes.

    Args:
        quantization: how its linear layers are stored.
        file: a GGUF file with the whole model, which is as large as what it holds.
        skip: paths of layers that are not.

    Raises:
        InputError, MissingDependencyError: this does not work here, see :func:`adapters.compression.backends.probe`.
    """
    place = Path(file).expanduser()
    if file and place.suffix.lower() == ".gguf" and place.is_file():
        return sum(p.numel() for p in model.parameters()), place.stat().st_size
    if quantization == "none":
        return 0, 0
    backends.check_works(quantization)
    few = sum(layer.weight.numel() for layer in backends.storable(model, quantization, skip).values())
    return few, round(few * backends.probe(quantization).bits / 8)


def look_at_language(config: TrainLanguageConfig, dtype: str, pruning: Pruning | None = None) -> Work:
    """As :func:`look`, for a language model: every sample of a batch is as long as ``max_length`` allows.

    Args:
        pruning: of the base that is trained on, where ``config`` names the whole one.

    Raises:
        InputError: the base is a hub id, or not a model for the task.
    """
    import torch

    from pipelines.language.loading import outputs
    from studio.training.language.layers import add_adapter

    plain = config.model_copy(update={"quantization": "none"})  # the same products, on smaller numbers
    base = shapes_of(config, dtype, pruning)
    with torch.device("meta"):
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        counts = {"model": sum(p.numel() for p in base.parameters())}
    few = stored(base, config.quantization, skip=outputs(base))
    with torch.device("meta"):
        model = add_adapter(base, plain).train()
    kept, operations, flops = count_language(model, config.batch_size, config.max_length)
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    remark = f"Every sample is counted with {config.max_length} tokens (max_length); shorter ones need less"
    if config.method != "lora":
        from adapters.layers.experts import size as sizes_of_experts

        remark = f"{remark}. {sizes_of_experts.size(model)}"
    return Work(counts, learnt, kept, flops, operations, "model", remark, *few)


def shapes_of(config: TrainLanguageConfig, dtype: str, pruning: Pruning | None = None) -> Any:
    """The base of ``config`` with shapes but no values; cut as ``pruning`` says, if there is one.

    Raises:
        InputError: the base is a hub id.
    """
    import torch
    import transformers

    from studio import library

    source = Path(library.resolve_language(config.base))
    if not (source / "config.json").is_file():
        raise InputError(f"What '{config.base}' needs cannot be estimated: only bases that are folders can.")
    kinds = {"causal": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification",
             "masked": "AutoModelForMaskedLM"}  # fmt: skip
    own = read_pruning(source)
    pruning = pruning or (own if own and not own.uniform else None)  # what is cut evenly has an ordinary configuration
    made: Any = transformers.AutoConfig.from_pretrained(source)
    made.use_cache = False
    kind: Any = getattr(transformers, kinds[config.task])
    with torch.device("meta"):
        base = kind.from_config(made).to(getattr(torch, _TORCH[dtype])).requires_grad_(False)
        if pruning is not None:
            from adapters.compression.slicing import resize

            resize(base, pruning)
            base.requires_grad_(False)
    return base


def count_language(model: Any, samples: int, length: int) -> tuple[int, int, float]:
    """:func:`count` of a language model without values, on so many samples of so many tokens."""
    import torch

    with torch.device("meta"):
        ids = torch.zeros(samples, length, dtype=torch.long)
        mask = torch.zeros(samples, 1, length, length, dtype=model.dtype)  # given, so that no library inspects it
        return count(_Logits(model), (ids, mask))


def measured_speed(device: str, dtype: str) -> float:
    """Floating-point operations per second of multiplying 1024 x 1024 matrices, the best of several tries."""
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    matrix = torch.ones(1024, 1024, device=device, dtype=kind)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * 1024**3 / best


_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class _Logits:
    """A language model as :func:`count` asks it: ids and mask in, logits out."""

    def __init__(self, model: Any) -> None:
        self.model, self.parameters = model, model.parameters

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).logits


def estimated(config: JobConfig) -> Estimate:
    """:func:`estimate` on the device that ``config`` chooses.

    Raises:
        InputError: as :func:`look`; there is no estimate for this kind of training; or the parts of the base cannot be
            built without their weights.
    """
    import torch

    from studio.jobs import kinds

    look_at = kinds.find(config.kind).counts()
    asked: Any = config
    device, dtype = chosen(asked)
    try:
        work: Work = look_at(asked, dtype)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"What '{asked.base}' needs cannot be estimated: {reason}") from error
    speed = measured_speed(device, dtype)
    return estimate(work, asked, dtype, torch.device(device).type, speed)


def chosen(config: Any) -> tuple[str, str]:
    """Device and precision ("fp32" ...) of ``config`` on this machine."""
    import torch

    from pipelines.precision import DTYPES, choose_dtype
    from studio import devices

    device = devices.resolve(config.device)
    precision = choose_dtype(config.dtype, torch.device(device))
    return device, next(name for name, value in DTYPES.items() if value == precision)


def sentence(found: Estimate) -> str:
    """The estimate as a sentence."""
    from studio.cli.output import duration, size

    parts = ", ".join(f"{name} {size(number)}" for name, number in found.memory.items())
    recorded = f" ({duration(found.recording)} of it to record trajectories)" if found.recording else ""
    return (
        f"About {size(found.total)} of memory ({parts}) and {duration(found.seconds)} for the training steps{recorded};"
        " loading, caching and samples are extra." + (f" {found.remark}." if found.remark else "")
    )


# ------------------------------------------------------------------------------------------------ counting


def _kind(dtype: str) -> Any:
    """torch's type for "fp32", "fp16" or "bf16"."""
    import torch

    return getattr(torch, _TORCH[dtype])


def _base(config: TrainImageConfig, dtype: str) -> tuple[Any, dict[str, int], tuple[int, int]]:
    """The base's family on the meta device, the numbers of each part, and what :func:`stored` says of its denoiser."""
    from studio.training.families import family_of

    pipe = _pipeline(config, _kind(dtype))
    family = family_of(pipe)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in _modules(pipe).items()}
    return family, counts, stored(family.denoiser, config.quantization, config.denoiser)


def _step(
    family: Any,
    config: TrainImageConfig,
    encoders: Mapping[str, Any],
    inputs: tuple[Any, ...],
    before: Callable[[], None] = lambda: None,
) -> tuple[int, int, float, int]:
    """(learnt numbers, bytes kept, floating-point operations, operations) of one step of models with an adapter.

    Args:
        encoders: the text encoders that learn.
        before: passes without gradients that belong to the step.
    """
    from studio.training.inject import trainable
    from studio.training.trainee import Trainee

    trainee = Trainee(family, encoders).train()
    kept, operations, flops = count(trainee, inputs, before)
    if config.gradient_checkpointing or config.memory == "low":
        family.denoiser.enable_gradient_checkpointing()
        blocks = sum(bool(getattr(part, "gradient_checkpointing", False)) for part in family.denoiser.modules())
        between, operations, flops = count(trainee, inputs, before)
        kept = between + kept // max(1, blocks)  # one block is complete while its gradients are computed
    learnt = sum(p.numel() for model in (family.denoiser, *encoders.values()) for p in trainable(model))
    return learnt, kept, flops, operations


def _pipeline(config: TrainImageConfig, dtype: Any) -> Any:
    """The base's pipeline with parts that have shapes but no values."""
    import diffusers
    import torch

    from pipelines.diffusion.loading import choose_family
    from studio import library

    source = Path(library.resolve_pipeline(config.base))
    if not (source / "model_index.json").is_file():
        raise InputError(f"What '{config.base}' needs cannot be estimated: only bases that are diffusers folders can.")
    family = choose_family(config.family, source)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list):
            library_name, kind_name = entry
            here = library_name in ("diffusers", "transformers")
            parts[name] = _part(source / name, library_name, kind_name, dtype) if here else None
    known = {name: part for name, part in parts.items() if name not in ("safety_checker", "feature_extractor")}
    kind: Any = getattr(diffusers, family.pipeline)
    optional = {name: None for name in ("safety_checker", "feature_extractor") if name in index}
    quiet = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    with torch.device("meta"):
        return kind(**known, **optional, **quiet)


def _part(place: Path, library: str, name: str, dtype: Any) -> Any:
    """A model on the meta device, or an ordinary tokenizer or scheduler."""
    import torch

    kind: Any = getattr(importlib.import_module(library), name)
    if torch.nn.Module not in kind.__mro__:
        return kind.from_pretrained(place)
    with torch.device("meta"):
        if library == "diffusers":
            made = kind.from_config(kind.load_config(place))
        else:
            made = kind(kind.config_class.from_pretrained(place))
    return made.to(dtype).requires_grad_(False).eval()


def _modules(pipe: Any) -> dict[str, Any]:
    import torch

    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _inputs(family: Any, config: TrainImageConfig, text_learns: bool, dtype: Any) -> tuple[Any, ...]:
    """(noisy latents, times, conditioning) of one batch of the largest size."""
    import torch

    from studio.datasets.buckets import place
    from studio.training.supply import bucket_rule

    size = bucket_rule(config, family).square
    batch = config.batch_size * (2 if config.prior_preservation else 1)
    factor = family.latent_factor
    config_of_vae = family.pipe.vae.config
    channels = int(config_of_vae.get("latent_channels") or config_of_vae["z_dim"])
    noisy = torch.empty(batch, channels, size[1] // factor, size[0] // factor, dtype=dtype)
    texts = [config.trigger] * batch
    given = family.tokens(texts) if text_learns else family.condition(texts)
    sizes = family.size_condition(size, place(size, size))
    given |= {name: value.expand(batch, *value.shape) for name, value in sizes.items()}
    times = family.process.times(torch.full((batch,), 0.5, device="cpu"))
    return noisy, times.to("meta"), {name: value.to("meta") for name, value in given.items()}


def count(trainee: Any, inputs: tuple[Any, ...], before: Callable[[], None] = lambda: None) -> tuple[int, int, float]:
    """(bytes kept for the backward pass, operations, floating-point operations) of one forward and backward pass, on
    the device of ``trainee`` and its inputs; ``before`` belongs to it and is called first."""
    import torch

    own = {parameter.untyped_storage()._cdata for parameter in trainee.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with _counting() as counter:
        before()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trainee(*inputs).float().square().mean()
        held = sum(storage.nbytes() for storage in kept.values())
        if loss.requires_grad:
            loss.backward()
    return held, counter.operations, counter.flops


@dataclass
class _Counter:
    operations: int = 0
    flops: float = 0.0


@contextmanager
def _counting() -> Iterator[_Counter]:
    """Inside, torch operations and their floating-point operations are counted; the sums are there on exit."""
    from unittest.mock import patch

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    mode: Any = TorchDispatchMode
    found = _Counter()
    name = "scaled_dot_product_attention"
    plain = getattr(torch.nn.functional, name)

    def fused(*args: Any, **kwargs: Any) -> Any:
        """Attention on the meta device as with the fused kernels of real devices: its matrix is not kept."""
        if not args or not args[0].is_meta:
            return plain(*args, **kwargs)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(*args[:3], None, torch.is_grad_enabled(), 0.0, False)[0]

    class Operations(mode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.operations += 1
            return func(*args, **(kwargs or {}))

    operations: Any = Operations()
    flops = FlopCounterMode(display=False)
    # A function mode would be off in the backward pass, where checkpointing computes forward again.
    with flops, operations, patch.object(torch.nn.functional, name, fused):
        yield found
    found.flops = float(flops.get_total_flops())
