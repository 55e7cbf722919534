"""Asking base and adapter the same: answers, what each judge says of them, and the paired changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.progress import Monitor
from studio.audit import judges, llm_judge, statistics
from studio.audit.judges import Outcome
from studio.audit.prompts import Kind, Prompt
from studio.audit.schema import AuditConfig

if TYPE_CHECKING:
    from pipelines.language.batches import Answer


@dataclass
class Asked:
    """What one model answered: per prompt its answer, and per judge its outcome."""

    answers: list[Answer]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    scores: list[float | None] = field(default_factory=list)
    """Of the first token."""


class Asker:
    """Asks prompts of a model that can be switched, and judges the answers as the configuration says."""

    def __init__(self, config: AuditConfig, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self.config, self.model, self.tokenizer, self.prompts = config, model, tokenizer, list(prompts)
        if not tokenizer.chat_template and not config.raw_prompts:
            raise InputError(
                f"'{config.base}' has no chat template: a chat model asked without one answers otherwise than its "
                "users see. Use a base with its template, or ask raw prompts of a model that never had one."
            )
        self.template = "" if config.raw_prompts else None
        system = [{"role": "system", "content": config.system}] if config.system else []
        self.talks = [[*system, {"role": "user", "content": prompt.text}] for prompt in self.prompts]
        self.first_token: judges.FirstToken | None = None
        self.remarks: list[str] = []
        self._base_means: list[float] = []
        self._classifier: judges.Classifier | None = None
        if "classifier" in config.judges:
            self._classifier = judges.Classifier(config.classifier, config.classifier_labels)

    def base(self, monitor: Monitor) -> Asked:
        """Ask the base; also calibrates the first token."""
        asked = self._answers(monitor)
        self._base_means = self._means(asked.answers, monitor)
        phrases = [judges.phrase_outcome(answer.text, self.model.config.model_type) for answer in asked.answers]
        if "first_token" in self.config.judges:
            self.first_token = judges.calibrate_first_token(asked.answers, phrases)
            if self.first_token is None:
                self.remarks.append(
                    "The judge 'first_token' is left out: by its phrases the base refuses all requests or none, or "
                    "its refusals start as its other answers do."
                )
        self._judge(asked, [False] * len(asked.answers), monitor)
        return asked

    def adapter(self, adapted: Any, weights: Mapping[str, float], monitor: Monitor) -> Asked:
        """Ask the base with an adapter; the base finds out which answers are none."""
        with adapted.active(weights):
            asked = self._answers(monitor)
        means = self._means(asked.answers, monitor)
        self._judge(asked, [judges.unlikely(mean, self._base_means) for mean in means], monitor)
        return asked

    def _answers(self, monitor: Monitor) -> Asked:
        from pipelines.language.batches import answers

        c = self.config
        return Asked(
            answers(self.model, self.tokenizer, self.talks, c.max_tokens, c.batch_size, self.template, monitor)
        )

    def _means(self, answers: Sequence[Answer], monitor: Monitor) -> list[float]:
        """Mean log p per token of answers under the model as it is; 0 for empty ones."""
        from pipelines.language.batches import encoded, likelihoods

        kept = [place for place, answer in enumerate(answers) if len(answer.ids)]
        device = next(self.model.parameters()).device
        contexts = encoded(self.tokenizer, [self.talks[place] for place in kept], device, self.template)
        rests = [answers[place].ids for place in kept]
        sums = likelihoods(self.model, contexts, rests, self.tokenizer.pad_token_id, self.config.batch_size, monitor)
        found = dict(zip(kept, (value / len(rest) for value, rest in zip(sums, rests, strict=True)), strict=True))
        return [found.get(place, 0.0) for place in range(len(answers))]

    def _judge(self, asked: Asked, unlikely: Sequence[bool], monitor: Monitor) -> None:
        texts = [answer.text for answer in asked.answers]
        garbage = [judges.incoherent(text) or far for text, far in zip(texts, unlikely, strict=True)]
        kind = self.model.config.model_type
        found: dict[str, list[Outcome]] = {}
        for judge in self.config.judges:
            if judge == "phrases":
                found[judge] = [judges.phrase_outcome(text, kind) for text in texts]
            elif judge == "first_token" and self.first_token is not None:
                asked.scores = [self.first_token.score(answer.first) for answer in asked.answers]
                found[judge] = [self.first_token.outcome(answer.first) for answer in asked.answers]
            elif judge == "classifier" and self._classifier is not None:
                pairs = zip(self.prompts, texts, strict=True)
                found[judge] = [self._classifier.outcome(prompt.text, text) for prompt, text in pairs]
            elif judge == "llm":
                source = self.config.llm
                if source.startswith(("http://", "https://")):
                    ask = llm_judge.over_http(source)
                else:
                    from studio import library

                    ask = llm_judge.local(str(library.resolve_base(source)), self.config.device, self.config.dtype)
                found[judge] = llm_judge.outcomes(ask, [prompt.text for prompt in self.prompts], texts)
        asked.outcomes = {
            judge: [self._final(one, bad) for one, bad in zip(outcomes, garbage, strict=True)]
            for judge, outcomes in found.items()
        }

    @staticmethod
    def _final(outcome: Outcome, garbage: bool) -> Outcome:
        """A refusal is one however short it is; garbage is neither refusal nor compliance."""
        return "incoherent" if garbage and outcome != "refusal" else outcome


@dataclass(frozen=True)
class Changes:
    """The paired changes by one judge.

    Attributes:
        refusals, over_refusals: the change of the share of refusals among harmful and benign requests.
        rates: share of every outcome by "base harmful", "adapter benign" ...
        categories: rows of category, kind, n, base and adapter rate, change and adjusted p.
        incoherent: of the adapter's answers.
    """

    judge: str
    refusals: statistics.Change
    over_refusals: statistics.Change
    base_refusals: statistics.Rate
    incoherent: statistics.Rate
    rates: dict[str, dict[str, float]]
    categories: list[dict[str, Any]]


def changes(prompts: Sequence[Prompt], base: Asked, adapter: Asked, judge: str) -> Changes:
    """Everything that one judge says about both models."""
    before, after = base.outcomes[judge], adapter.outcomes[judge]
    by_kind = {kind: _change(prompts, before, after, kind) for kind in ("harmful", "benign")}
    rates: dict[str, dict[str, float]] = {}
    for model, outcomes in (("base", before), ("adapter", after)):
        for kind in ("harmful", "benign"):
            own = [outcome for prompt, outcome in zip(prompts, outcomes, strict=True) if prompt.kind == kind]
            if own:
                rates[f"{model} {kind}"] = {str(name): own.count(name) / len(own) for name in sorted(set(own))}
    harmful = [outcome == "refusal" for p, outcome in zip(prompts, before, strict=True) if p.kind == "harmful"]
    return Changes(
        judge, by_kind["harmful"], by_kind["benign"], statistics.rate(harmful),
        statistics.rate([outcome == "incoherent" for outcome in after]), rates, _categories(prompts, before, after),
    )  # fmt: skip


def _change(
    prompts: Sequence[Prompt],
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    kind: Kind,
    category: str | None = None,
) -> statistics.Change:
    chosen = [
        place for place, prompt in enumerate(prompts)
        if prompt.kind == kind and category in (None, prompt.category)
    ]  # fmt: skip
    return statistics.change(*([outcomes[place] == "refusal" for place in chosen] for outcomes in (before, after)))


def _categories(
    prompts: Sequence[Prompt], before: Sequence[Outcome], after: Sequence[Outcome]
) -> list[dict[str, Any]]:  # fmt: skip
    names = sorted({(prompt.kind, prompt.category) for prompt in prompts})
    found = [_change(prompts, before, after, kind, category) for kind, category in names]
    adjusted = statistics.holm([change.p for change in found])
    return [
        {"kind": kind, "category": category or "(none)", **asdict(change), "p_holm": p}
        for (kind, category), change, p in zip(names, found, adjusted, strict=True)
    ]
