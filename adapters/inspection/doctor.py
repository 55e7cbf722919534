"""The composition doctor: which adapters will interfere with each other, and what to do about it.

It compares the weights (:mod:`adapters.inspection.interference`), strengths and trigger words of the adapters, never
pictures. Its prediction for a pair is the part of the two updates inside each other's subspaces; the constants
below are rules of thumb. ``benchmarks/interference.py`` measures how well the prediction agrees with measured bleed,
over the shipped adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from adapters.catalogue import Method
from adapters.errors import InputError
from adapters.formats.lora import LoraFile
from adapters.inspection.interference import Overlap, Update, compare, updates

METHOD = Method(
    name="doctor",
    title="Composition doctor",
    summary="Compares the subspaces, strengths and trigger words of adapters, predicts interference and gives advice.",
    stage="inspection",
    makes="report",
    paper="",
    entry="adapters.inspection.doctor:diagnose",
)

Level = Literal["none", "low", "medium", "high"]
HIGH = 0.25
"""Interference from which the level is "high": a quarter of the updates is in each other's subspaces."""
MEDIUM = 0.05
BALANCED = 1.5
"""Strengths up to this many times the typical one are left as they are."""
FAR_WEAKER = 4.0
"""An adapter this many times weaker than the strongest is reported and does not count for the typical strength."""
LIKE_CHANCE = 1.5
"""Overlap up to this many times that of random subspaces is no sign of a conflict."""

ORDINARY = frozenset(("a", "an", "and", "by", "image", "in", "of", "on", "photo", "picture", "style", "the", "with"))
"""Words of trigger phrases that trigger nothing by themselves."""


@dataclass(frozen=True)
class Subject:
    """An adapter to examine.

    Attributes:
        name: its name in the diagnosis.
        file: the adapter.
        triggers: its trigger words or phrases.
        weight: the strength it is used with.
        kind: "concept", "style", or empty if unknown.
    """

    name: str
    file: LoraFile
    triggers: tuple[str, ...] = ()
    weight: float = 1.0
    kind: str = ""


@dataclass(frozen=True, eq=False)
class Pair:
    """The diagnosis of two adapters.

    Attributes:
        first, second: their names.
        interference: predicted, 0 to 1.
        level: the interference in words.
        overlap: the measurements behind it.
        ratio: strength of the second over that of the first, in the layers both change.
        words: trigger words they share.
    """

    first: str
    second: str
    interference: float
    level: Level
    overlap: Overlap
    ratio: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """Recommended composition method, weight per adapter, whether to use regions, and the reasons."""

    method: str
    weights: Mapping[str, float]
    regions: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The doctor's findings.

    Attributes:
        strengths: adapter -> Frobenius norm of all its updates, times its weight.
        layers: adapter -> number of its layers.
        pairs: every pair, the worst first.
        remarks: about trigger words and single adapters.
        advice: what to do.
    """

    strengths: Mapping[str, float]
    layers: Mapping[str, int]
    pairs: tuple[Pair, ...]
    remarks: tuple[str, ...]
    advice: Advice

    def predicted(self) -> dict[tuple[str, str], float]:
        """(first, second) -> predicted interference."""
        return {(pair.first, pair.second): pair.interference for pair in self.pairs}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "adapters": [
                {"name": name, "strength": strength, "layers": self.layers[name]}
                for name, strength in self.strengths.items()
            ],
            "pairs": [
                {
                    "first": pair.first, "second": pair.second, "interference": pair.interference,
                    "level": pair.level, "chance": pair.overlap.chance, "inputs": pair.overlap.inputs,
                    "outputs": pair.overlap.outputs, "cosine": pair.overlap.cosine, "common": pair.overlap.common,
                    "ratio": pair.ratio, "words": list(pair.words),
                    "layers": {name: asdict(layer) for name, layer in pair.overlap.layers.items()},
                }
                for pair in self.pairs
            ],
            "remarks": list(self.remarks),
            "advice": {
                "method": self.advice.method, "weights": dict(self.advice.weights),
                "regions": self.advice.regions, "reasons": list(self.advice.reasons),
            },
        }  # fmt: skip


def diagnose(subjects: Sequence[Subject], prompt: str = "") -> Diagnosis:
    """Examine adapters that are to be used together.

    Args:
        subjects: at least one; of one base model.
        prompt: the prompt, to check for trigger words; empty = unknown.

    Raises:
        InputError: no adapter, or a name used twice.
        FamilyError: adapters of different base models.
    """
    names = [subject.name for subject in subjects]
    if not subjects:
        raise InputError("Give the doctor at least one adapter.")
    if len(set(names)) != len(names):
        raise InputError(f"An adapter is named twice: {', '.join(names)}.")
    known = {subject.name: updates(subject.file) for subject in subjects}
    pairs = [_pair(a, b, known[a.name], known[b.name]) for a, b in combinations(subjects, 2)]
    pairs.sort(key=lambda pair: -pair.interference)
    strengths = {
        subject.name: abs(subject.weight) * sum(part.norm**2 for part in known[subject.name].values()) ** 0.5
        for subject in subjects
    }
    return Diagnosis(
        strengths,
        {name: len(parts) for name, parts in known.items()},
        tuple(pairs),
        tuple(_remarks(subjects, strengths, prompt)),
        _advice(subjects, pairs, strengths),
    )


def common_words(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Words, other than :data:`ORDINARY` ones, that occur in the triggers of both; case does not matter."""
    return tuple(sorted((_words(first) & _words(second)) - ORDINARY))


def balanced_weights(strengths: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights with which no adapter is more than :data:`BALANCED` times as strong as the typical one.

    Far weaker ones (:func:`outliers`) do not count: a barely trained adapter must not weaken the others.
    """
    limit = BALANCED * _typical(strengths)
    return {
        name: round(weight * limit / strengths[name], 2) if strengths[name] > limit > 0 else weight
        for name, weight in weights.items()
    }


def outliers(strengths: Mapping[str, float]) -> list[str]:
    """The adapters that change something, but :data:`FAR_WEAKER` times less than the strongest."""
    least = max(strengths.values(), default=0.0) / FAR_WEAKER
    return [name for name, strength in strengths.items() if 0 < strength < least]


def _typical(strengths: Mapping[str, float]) -> float:
    """The (lower) median strength of the adapters that are neither zero nor far weaker than the others."""
    weak = outliers(strengths)
    counted = sorted(strength for name, strength in strengths.items() if strength > 0 and name not in weak)
    return counted[(len(counted) - 1) // 2] if counted else 0.0


def _pair(first: Subject, second: Subject, a: Mapping[str, Update], b: Mapping[str, Update]) -> Pair:
    overlap = compare(a, b)
    energy = [
        abs(subject.weight) * sum(getattr(layer, side) ** 2 for layer in overlap.layers.values()) ** 0.5
        for subject, side in ((first, "first"), (second, "second"))
    ]
    ratio = energy[1] / energy[0] if energy[0] > 0 else 0.0
    words = common_words(first.triggers, second.triggers)
    return Pair(first.name, second.name, overlap.interference, _level(overlap), overlap, ratio, words)


def _level(overlap: Overlap) -> Level:
    if not overlap.layers:
        return "none"
    if overlap.interference >= HIGH:
        return "high"
    if overlap.interference < MEDIUM or overlap.interference <= LIKE_CHANCE * overlap.chance:
        return "low"
    return "medium"


def _remarks(subjects: Sequence[Subject], strengths: Mapping[str, float], prompt: str) -> list[str]:
    spoken = _words([prompt])
    found = []
    for subject in subjects:
        if strengths[subject.name] == 0:
            found.append(f"{subject.name} changes nothing: its weight is 0 or it was never trained.")
        if subject.file.is_dora():
            found.append(f"{subject.name} is a DoRA adapter: it can be switched on and off, but not faded.")
        if prompt and subject.triggers and not any(_words([text]) <= spoken for text in subject.triggers):
            words = " or ".join(map(repr, subject.triggers))
            found.append(f"The prompt does not trigger {subject.name}: add {words}.")
    for a, b in combinations(subjects, 2):
        if shared := common_words(a.triggers, b.triggers):
            found.append(f"{a.name} and {b.name} are both triggered by {', '.join(map(repr, shared))}.")
    return found


def _advice(subjects: Sequence[Subject], pairs: Sequence[Pair], strengths: Mapping[str, float]) -> Advice:
    given = {subject.name: subject.weight for subject in subjects}
    weights = balanced_weights(strengths, given)
    typical = _typical(strengths)
    reasons = [
        f"{name} is {strengths[name] / typical:.1f} times as strong as the typical adapter here; at weight "
        f"{weights[name]:g} it does not drown the others."
        for name in given
        if weights[name] != given[name]
    ]
    reasons += [
        f"{name} is far weaker than the others ({typical / strengths[name]:.0f} times): it was probably trained too "
        "little, or for another base. Train it longer or raise its weight step by step; keep the others as they are."
        for name in outliers(strengths)
    ]
    if not pairs:
        return Advice("merge", weights, False, (*reasons, "A single adapter has nothing to conflict with."))
    worst = pairs[0]
    part = f"{worst.interference:.0%} of the updates of {worst.first} and {worst.second} is in each other's subspaces"
    kinds = {subject.name: subject.kind for subject in subjects}
    clash = [pair for pair in pairs if pair.words]
    if clash:
        text = f"{clash[0].first} and {clash[0].second} share a trigger word, so one prompt always triggers both"
        return Advice("activation", weights, True, (*reasons, f"{text}: give each a region with its own prompt."))
    if worst.level in ("none", "low"):
        text = f"only {part}" if worst.level == "low" else "the adapters change different layers"
        return Advice("merge", weights, False, (*reasons, f"{text[0].upper()}{text[1:]}: using all at once is fine."))
    styles = {kinds[worst.first], kinds[worst.second]}
    if "style" in styles and len(subjects) == 2:
        text = f"{part}: if they take turns, they never mix within a step"
        if styles == {"style", "concept"}:
            text += "; or merge them into one LoRA with  studio lora merge CONCEPT STYLE --method np-lora"
        return Advice("switch", weights, False, (*reasons, f"{text}."))
    if worst.level == "medium" and styles != {"concept"}:
        text = "if they take turns, they never mix within a step, at the cost of one adapter"
        return Advice("switch", weights, False, (*reasons, f"{part}: {text}; regions separate them completely."))
    text = "let each act only where its subject is (regions), or predict with each separately (composite)"
    return Advice("activation", weights, True, (*reasons, f"{part}: {text}."))


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}
