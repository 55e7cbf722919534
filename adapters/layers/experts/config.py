"""The configuration of a mixture of LoRA experts: independent choices, of which MixLoRA, MoLA, LoRAMoE, LLaVA-MoLE and
X-LoRA are combinations.

Everything is checked when the object is made; what depends on the model (experts per layer, which modules) is resolved
once, when the adapter is added, and the resolved lists are what ``adapter_config.json`` holds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import peft
from packaging.version import Version
from peft import PeftConfig

from adapters.errors import InputError, nearest

SCHEMA_VERSION = 1
"""Version of the fields below and of the tensors' names."""

PEFT_RANGE = ("0.21", "0.22")
"""First supported version of PEFT, and the first that is not: the tuner rests on PEFT's internal hooks."""

LAYERS_PATTERN = r"(?:^|\.)(?:layers|layer|h|block|blocks|transformer_blocks)\.(\d+)(?:\.|$)"
"""Where the number of a layer is in a module's path."""

SHAPES: dict[str, tuple[int, ...]] = {
    "triangle": (8, 6, 4, 2),
    "inverted-triangle": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "rectangle": (5, 5, 5, 5),
    "diamond": (2, 8, 8, 2),
}
"""Experts per block of layers, bottom to top, by name: MoLA (arXiv 2402.08562, section 3.2); "diamond" puts more
of them in the middle, as the NAACL 2025 version of the paper prefers (its own numbers there are not known to us)."""


class StudioPeftType(str, enum.Enum):  # noqa: UP042  PEFT's own types are made so
    """The type of our tuner, as ``adapter_config.json`` names it."""

    MOEADAPTER = "MOEADAPTER"


_CHOICES: dict[str, tuple[str, ...]] = {
    "placement": ("linear", "ffn_block"),
    "attention": ("none", "plain", "experts"),
    "expert_kind": ("lora", "rslora", "dora"),
    "router": ("topk", "top1", "dense", "external"),
    "gate": ("renormalised", "probability", "one", "straight_through"),
    "router_init": ("normal", "kaiming"),
    "trained": ("both", "router"),
    "aux_loss": ("none", "load_balance", "sample_balance", "localized"),
    "aux_scope": ("module", "layer", "model"),
    "aux_reduce": ("mean", "sum"),
    "aux_norm": ("k", "one", "1/N"),
    "lbc_form": ("cv2", "var_over_mean"),
    "compute": ("auto", "stacked", "sorted", "loop"),
}


@dataclass
class MoeConfig(PeftConfig):
    """A mixture of LoRA experts. N is the number of experts of a layer, k how many of them a token uses.

    A value per layer (``num_experts``, ``top_k``, ``r``) is one number, a list with one entry per layer, or a shorter
    list of b blocks: layer j of n gets entry floor(j b / n). Experts may also be a shape by name, or
    ``{"shape": name, "blocks": [...]}`` with numbers of one's own.

    Attributes:
        target_modules: last parts of module names, a regular expression of whole names, or None for every linear layer
            inside the layers of the model.
        exclude_modules: names (or a regular expression) that are left out.
        modules_to_save: other modules that are trained and saved whole.
        within: path of the part of the model that is adapted; None = all of it, or the language model where the model
            has one beside a vision tower.
        layers_pattern: regular expression of a module's path whose first group is the number of its layer.
        placement: "linear": experts beside each linear layer, y = W0 x + sum_e g_e s B_e A_e x, each with a router of
            its own; "ffn_block": an expert is the whole frozen feed-forward block with a LoRA on each of its linear
            layers, and one router per block mixes the blocks' outputs, y = FFN(x) + sum_e g_e (FFN_e(x) - FFN(x)),
            which is MixLoRA's sum_e g_e FFN_e(x) (arXiv 2404.15159, eq. 4-6) for gates that sum to 1.
        attention: targeted layers outside the feed-forward blocks get nothing, one plain LoRA (N = 1), or experts.
        num_experts: N.
        r: rank of each expert.
        lora_alpha: s = alpha / r; alpha / sqrt(r) for "rslora".
        lora_dropout: of the experts' input; the router sees the input itself.
        plain_r, plain_alpha: rank and alpha where there is one plain LoRA; None = as the experts.
        expert_kind: "dora": each expert linear is m (W0 + s B A) / |W0 + s B A| with a trained m per row
            (arXiv 2402.09353), the norm detached.
        router: "topk", "top1", "dense" (all experts), or "external": gates given from outside, in the routing context.
        top_k: k; None = min(2, N) for "topk". Only for "topk".
        gate: what multiplies a chosen expert. With p = softmax of the router's logits in fp32: "renormalised": p over
            the sum of the chosen; "probability": p; "one": 1, so that the task's loss does not train the router;
            "straight_through": 1 with the gradient of log p.
        router_bias, router_init: "normal": N(0, 0.02); "kaiming": as ``nn.Linear`` starts.
        trained: "router" freezes the experts.
        aux_loss: "load_balance": N sum_i F_i P_i over tokens; "sample_balance": the same within each sample, averaged;
            "localized": LoRAMoE's constraint (arXiv 2312.09979), which needs the type of each sample.
        aux_coefficient: its weight; 0 = none.
        aux_scope: what is pooled into one value: each router, the routers of a layer, or the whole model.
        aux_reduce: how these values become one.
        aux_norm: the value of the balance terms at uniform routing: k, 1 or 1/N.
        lbc_delta, lbc_form: of "localized": coefficients 1 +- delta; squared coefficient of variation (as the code) or
            variance over mean (as the paper).
        lbc_groups: type of a sample -> 0 or 1; 1 is pushed towards the *second* half of the experts.
        lbc_per_token: divide by the sample's tokens first, so that long samples do not dominate.
        attach_aux_to_output: add the auxiliary loss to ``outputs.loss`` of the model, for training programs that know
            nothing of it.
        compute: how experts are computed; all agree.
        experts: of X-LoRA: the frozen experts in the order of their gates, ``{"name", "path", "sha256"}`` each.
        frozen: of X-LoRA: the adapted modules in the model's order, ``{"module", "ranks", "dora"}`` each, with the rank
            of every expert there (0 = it lacks the module).
        classifier: of X-LoRA: :class:`~adapters.layers.experts.classifier.ClassifierOptions`.
        preset: name of the method these choices come from.
        num_layers: layers of the model the lists below were resolved for.
        schema_version: of this file.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    within: str | None = None
    layers_pattern: str = LAYERS_PATTERN
    placement: str = "linear"
    attention: str = "experts"
    num_experts: Any = 8
    r: Any = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    plain_r: int | None = None
    plain_alpha: float | None = None
    expert_kind: str = "lora"
    router: str = "topk"
    top_k: Any = None
    gate: str = "renormalised"
    router_bias: bool = False
    router_init: str = "kaiming"
    trained: str = "both"
    aux_loss: str = "none"
    aux_coefficient: float = 0.0
    aux_scope: str = "layer"
    aux_reduce: str = "mean"
    aux_norm: str = "k"
    lbc_delta: float = 0.1
    lbc_form: str = "cv2"
    lbc_groups: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 1})
    lbc_per_token: bool = False
    attach_aux_to_output: bool = False
    compute: str = "auto"
    experts: list[dict[str, Any]] = field(default_factory=list)
    frozen: list[dict[str, Any]] = field(default_factory=list)
    classifier: dict[str, Any] = field(default_factory=dict)
    preset: str = ""
    num_layers: int | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = StudioPeftType.MOEADAPTER
        self.lbc_groups = {int(kind): int(group) for kind, group in self.lbc_groups.items()}
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)
        self.places: dict[str, Any] = {}  # module path -> Place, once resolved; never saved
        self._check()

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys that this version does not know: dropping one would load another adapter than was saved."""
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise InputError(
                f"The adapter's configuration has the key '{unknown[0]}'{nearest(unknown[0], known)}, which this "
                "version does not know: load it with the version that wrote it."
            )
        return kwargs

    @property
    def routed(self) -> bool:
        """Whether a router of its own is trained in each place."""
        return self.router != "external"

    @property
    def collects(self) -> bool:
        """Whether training needs what the routers decided."""
        return self.aux_loss != "none" and self.aux_coefficient > 0

    def scale(self, rank: int, plain: bool = False) -> float:
        """s of an expert (or of the plain LoRA) of ``rank``."""
        alpha = self.plain_alpha if plain and self.plain_alpha is not None else self.lora_alpha
        return float(alpha) / (rank**0.5 if self.expert_kind == "rslora" else rank)

    # ------------------------------------------------------------------------------------------ checks
    def _check(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"The adapter's configuration has schema_version {self.schema_version}, and this version reads "
                f"{SCHEMA_VERSION}: load it with the version that wrote it."
            )
        for name, possible in _CHOICES.items():
            value = getattr(self, name)
            if value not in possible:
                raise InputError(
                    f"{name} cannot be '{value}'{nearest(str(value), possible)}: possible are {', '.join(possible)}."
                )
        self._check_numbers()
        self._check_router()
        self._check_losses()
        self._check_frozen()

    def _check_frozen(self) -> None:
        if not (self.experts or self.frozen or self.classifier):
            return
        from adapters.layers.experts.classifier import ClassifierOptions

        if not self.experts:
            raise InputError("X-LoRA mixes experts that are trained already: name at least one.")
        if self.router != "external" or self.placement != "linear":
            raise InputError("Frozen experts with a classifier need router 'external' and placement 'linear'.")
        names = [str(expert.get("name")) for expert in self.experts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"Two experts are called '{twice}': give each a name of its own.")
        ClassifierOptions.of(self.classifier).check(len(names))
        for entry in self.frozen:
            if len(entry.get("ranks", ())) != len(names) or not any(entry["ranks"]):
                raise InputError(f"The ranks of '{entry.get('module')}' are not one for each of {len(names)} experts.")

    def _check_numbers(self) -> None:
        for name in ("num_experts", "r", "top_k"):
            _check_per_layer(name, getattr(self, name))
        if self.plain_r is not None and self.plain_r < 1:
            raise InputError(f"plain_r must be at least 1, but is {self.plain_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout must be in [0, 1), but is {self.lora_dropout:g}.")
        if not self.lora_alpha > 0:
            raise InputError(f"lora_alpha must be above 0, but is {self.lora_alpha:g}.")

    def _check_router(self) -> None:
        k = self.top_k
        if self.router == "top1" and k not in (None, 1) and set(_numbers(k)) != {1}:
            raise InputError(f"The router 'top1' uses one expert per token: leave top_k (here {k}) empty.")
        if self.router in ("dense", "external") and k is not None:
            raise InputError(
                f"The router '{self.router}' uses every expert: leave top_k (here {k}) empty, or set router to 'topk'."
            )
        if self.gate in ("one", "straight_through") and self.router in ("dense", "external"):
            raise InputError(
                f"The gate '{self.gate}' is for routers that choose experts, not for '{self.router}': set gate to "
                "'probability'."
            )
        if self.router == "top1" and self.gate == "renormalised":
            raise InputError(
                "With one expert per token a renormalised gate is always 1 and the router never learns from the task: "
                "set gate to 'one' (to be explicit), 'straight_through' or 'probability'."
            )
        many = self.num_experts if isinstance(self.num_experts, int) else 2
        if self.router == "topk" and k == 1 and self.gate == "renormalised" and many > 1:
            raise InputError(
                "With top_k 1 a renormalised gate is always 1 and the router never learns from the task: use router "
                "'top1' with gate 'one' (to be explicit), 'straight_through' or 'probability'."
            )

    def _check_losses(self) -> None:
        if not self.aux_coefficient >= 0:
            raise InputError(f"aux_coefficient must be 0 or more, but is {self.aux_coefficient:g}.")
        if self.aux_loss != "none" and self.router == "external":
            raise InputError(
                f"The loss '{self.aux_loss}' trains routers, and router 'external' has none: set aux_loss to 'none'."
            )
        if self.aux_loss in ("load_balance", "sample_balance") and self.router == "dense":
            raise InputError(
                f"The loss '{self.aux_loss}' counts chosen experts, but router 'dense' uses all: set aux_loss to "
                "'localized' or 'none'."
            )
        if self.aux_loss == "localized":
            if self.router != "dense":
                raise InputError(
                    f"The loss 'localized' is for router 'dense', not '{self.router}': set aux_loss to 'load_balance'."
                )
            if not 0 <= self.lbc_delta < 1:
                raise InputError(f"lbc_delta must be in [0, 1), but is {self.lbc_delta:g}.")
            if not self.lbc_groups or set(self.lbc_groups.values()) - {0, 1}:
                raise InputError(f"lbc_groups gives each type of sample a group, 0 or 1, but is {self.lbc_groups}.")
            odd = [n for n in _numbers(self.num_experts) if n > 1 and n % 2]
            if odd:
                raise InputError(
                    f"The loss 'localized' halves the experts, but there are {odd[0]}: set num_experts to an even "
                    "number."
                )


def per_layer(name: str, value: Any, layers: int) -> list[int]:
    """A value per layer as a list with one entry for each of ``layers`` layers.

    Raises:
        InputError: the list is longer than the model.
    """
    blocks = _numbers(value)
    named = isinstance(value, str | Mapping)  # a shape fits any depth
    if len(blocks) > layers and not named:
        raise InputError(
            f"{name} has {len(blocks)} entries, but the model has {layers} layers: give one number, one per layer, or "
            "fewer, each for a block of layers."
        )
    return [blocks[j * len(blocks) // layers] for j in range(layers)]


def _numbers(value: Any) -> list[int]:
    """The numbers of a value per layer, block by block."""
    if isinstance(value, str):
        return list(SHAPES[value])
    if isinstance(value, Mapping):
        return list(value.get("blocks") or SHAPES[value["shape"]])
    return [value] if isinstance(value, int) else list(value)


def _check_per_layer(name: str, value: Any) -> None:
    if value is None and name == "top_k":
        return
    shape = value.get("shape", "rectangle") if isinstance(value, Mapping) else value
    if isinstance(shape, str) and (name != "num_experts" or shape not in SHAPES):
        raise InputError(f"{name} cannot be '{shape}'{nearest(shape, SHAPES)}: shapes are {', '.join(SHAPES)}.")
    if not isinstance(value, int | str | Mapping | Sequence):
        raise InputError(f"{name} is a number or a list with one per layer, not {value!r}.")
    numbers = _numbers(value)
    if not numbers or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers):
        raise InputError(f"{name} must be whole numbers of at least 1, but is {value!r}.")


def check_peft() -> None:
    """Raise :class:`InputError` for a version of PEFT that the tuner does not fit."""
    low, high = PEFT_RANGE
    if not Version(low) <= Version(peft.__version__) < Version(high):
        raise InputError(
            f"Mixtures of experts need PEFT from {low} up to (not including) {high}, but {peft.__version__} is "
            f"installed: run  pip install 'peft>={low},<{high}'."
        )
