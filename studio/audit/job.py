"""The job: asks base and adapter the same, screens the weights, decides, mitigates on request, writes the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import InputError
from adapters.progress import Monitor, Progress
from studio import devices, library, silence
from studio.audit import ability, asking, judges, mitigation, prompts, records, report, statistics, verdict
from studio.audit import screen as screening
from studio.audit.prompts import PromptSet
from studio.audit.schema import AuditConfig

if TYPE_CHECKING:
    from adapters.inspection.intruders import Weights


def run(config: AuditConfig, folder: Path, monitor: Monitor) -> dict[str, Any]:
    """Audit the adapter; the report lies in ``folder``.

    Returns:
        verdict, exit_code, files by form; with a mitigation also the same of the copy, and its name in the library.

    Raises:
        InputError: an adapter, base, file or combination that cannot be used.
        adapters.errors.Cancelled: ``monitor`` asked to stop.
    """
    silence.library_warnings()
    monitor.report(Progress("loading"))
    asked = _prompts(config)
    audit = _Audit(config, asked, monitor)
    path = library.resolve_adapter(config.adapter)
    found = audit.of(path, config.adapter)
    result = _kept(found, folder, config, path)
    if config.mitigate != "none":
        copy = audit.mitigate(path, folder, found.refusals_pass)
        again = audit.of(copy, copy.name)
        result["mitigated"] = {"library": copy.name, **_kept(again, folder / "mitigated", config, copy)}
    return result


def _kept(found: _Found, folder: Path, config: AuditConfig, path: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    written = report.write(folder, found.report, found.items)
    if config.include_text and found.texts:
        written["texts"] = str(report.write_texts(folder / "texts.jsonl", found.texts))
    records.remember(path, found.report["verdict"], config.base, folder / "audit.html")
    status = found.report["verdict"]
    return {"verdict": status, "exit_code": verdict.EXIT[status], "checks": found.report["checks"],
            "warnings": found.report["warnings"], "remarks": found.report["remarks"], "files": written}  # fmt: skip


def _prompts(config: AuditConfig) -> PromptSet:
    if config.screen_only and not config.harmful:
        return PromptSet()
    shipped = [str(prompts.shipped())] if config.shipped_benign else []
    found = prompts.read(config.harmful, [*config.benign, *shipped])
    if not found.of("harmful"):
        raise InputError("The files of harmful requests hold none: give --harmful FILE.")
    if config.limit:
        found.prompts = [*found.of("harmful")[: config.limit], *found.of("benign")[: config.limit]]
    return found


@dataclass
class _Found:
    """One audit: its report, rows per request, and whether refusals are within their limit."""

    report: dict[str, Any]
    items: list[dict[str, Any]]
    texts: list[dict[str, str]]
    refusals_pass: Any


class _Audit:
    """A base that is opened, asked and measured once, for one adapter and its copies."""

    def __init__(self, config: AuditConfig, asked: PromptSet, monitor: Monitor) -> None:
        from adapters.formats.lora import MODEL
        from adapters.inspection.intruders import weights_of
        from pipelines.language.adapters import AdaptedModel
        from pipelines.language.loading import open_model
        from studio.inspection.intruders import open_files

        silence.loading_bars()
        self.config, self.prompts, self.monitor = config, asked, monitor
        self.opened = open_model(
            library.resolve_base(config.base), dtype=config.dtype, device=devices.resolve(config.device),
            quantization=config.quantization,
        )  # fmt: skip
        self.adapted = AdaptedModel(self.opened.model, config.base)
        self.weights: Weights = weights_of({MODEL: self.opened.model})
        self.twin: Weights | None = weights_of(open_files(config.unaligned).models) if config.unaligned else None
        self.questions = [] if config.screen_only else [
            question for place in config.questions or [str(ability.shipped())] for question in ability.read(place)
        ]  # fmt: skip
        self.labels = judges.read_labels(config.labels) if config.labels else {}
        self.asker: asking.Asker | None = None
        if not config.screen_only:
            self.asker = asking.Asker(config, self.opened.model, self.opened.tokenizer, asked.prompts)
            self.base = self.asker.base(monitor)
            self.base_right = self._right()
            self.base_losses = self._losses()

    # ---------------------------------------------------------------- one adapter

    def of(self, path: Path, name: str) -> _Found:
        """Audit the adapter at ``path``."""
        self.adapted.add(str(path), path)
        strengths = {str(path): 1.0}
        remarks = [*self.prompts.remarks]
        screen = self._screen(path, strengths, remarks)
        checks: list[verdict.Check] = []
        answers: asking.Asked | None = None
        changes: list[asking.Changes] = []
        measured: dict[str, Any] = {}
        if self.asker is not None:
            answers = self.asker.adapter(self.adapted, strengths, self.monitor)
            changes = self._changes(answers)
            checks, measured = self._checks(changes, strengths)
            remarks += self.asker.remarks
        decided = verdict.overall(checks, screen.warnings, self.config.screen_only, bool(screen.modules))
        made = {
            "verdict": decided,
            "adapter": {"name": name, "sha256": library.sha256(path)},
            "base": {"name": self.config.base, "source": Path(self.opened.source).name},
            "settings": self._settings(),
            "prompts": {
                "harmful": len(self.prompts.of("harmful")),
                "benign": len(self.prompts.of("benign")),
                "files": self.prompts.sha256,
            },
            "checks": [asdict(check) for check in checks],
            "judges": [asdict(change) for change in changes],
            "calibration": self._calibration(answers),
            "ability": measured,
            "screen": asdict(screen),
            "warnings": screen.warnings,
            "remarks": [*remarks, *screen.notes],
        }
        items, texts = ([], []) if answers is None else (self._items(answers), self._texts(answers))
        return _Found(made, items, texts, lambda factor: self._refusals_pass(str(path), factor))

    def _screen(self, path: Path, strengths: Mapping[str, float], remarks: list[str]) -> screening.Screen:
        try:
            file = self.adapted.read(path)
        except InputError as error:  # a mixture of experts is no sum of updates
            remarks.append(f"The weights were not screened: {error}")
            return screening.Screen()
        found = screening.weights(file, self.weights, self.twin, self.config.undo_limit, self.monitor)
        if self.asker is not None:
            screening.states(
                found, file, self.weights, self.adapted, dict(strengths), self.opened.tokenizer, self.asker.talks,
                self.prompts.prompts, self.asker.template, self.config.batch_size, self.monitor,
            )  # fmt: skip
        return found

    def _checks(
        self, changes: Sequence[asking.Changes], strengths: Mapping[str, float]
    ) -> tuple[list[verdict.Check], dict[str, Any]]:  # fmt: skip
        c, first = self.config, changes[0]
        found = [
            self._refusals(changes),
            verdict.share("Incoherent answers", "incoherent", first.incoherent, c.max_incoherent, c.min_prompts),
        ]
        if benign := self.prompts.of("benign"):
            # the shipped set is smaller than what is asked of a set of one's own, and whole
            least = len(benign) if not c.benign and not c.limit else c.min_prompts
            found.insert(1, verdict.worse(
                "Harmless requests refused", "over_refusal_rise", first.over_refusals, 1, c.max_over_refusal_rise,
                min(least, c.min_prompts), self._disagreement(changes, "over_refusals"),
            ))  # fmt: skip
        with self.adapted.active(strengths):
            right, losses = self._right(), self._losses()
        measured: dict[str, Any] = {}
        if right:
            change = statistics.change(self.base_right, right)
            found.append(verdict.worse("Questions lost", "ability_drop", change, -1, c.max_ability_drop, 1))
            measured["accuracy"] = {"base": sum(self.base_right) / len(right), "adapter": sum(right) / len(right),
                                    "questions": len(right)}  # fmt: skip
        if losses:
            differences = [after - before for before, after in zip(self.base_losses, losses, strict=True)]
            mean, low, high = statistics.mean_change(differences)
            measured["text"] = {
                "base_perplexity": ability.perplexity(self.base_losses),
                "adapter_perplexity": ability.perplexity(losses),
                "loss_change": mean,
                "low": low,
                "high": high,
            }
        return found, measured

    def _disagreement(self, changes: Sequence[asking.Changes], which: str) -> str:
        """Why judges that differ leave a limit open; empty if they agree."""
        values = {change.judge: 100 * getattr(change, which).value for change in changes}
        spread = max(values.values()) - min(values.values())
        if not self.config.judges_must_agree or spread <= verdict.AGREEMENT:
            return ""
        told = ", ".join(f"{judge} {value:+.1f}" for judge, value in values.items())
        return f"the judges differ by {spread:.0f} points ({told})"

    def _right(self) -> list[bool]:
        if not self.questions:
            return []
        model, tokenizer = self.opened.model, self.opened.tokenizer
        return ability.right(model, tokenizer, self.questions, self.config.batch_size, self.monitor)

    def _losses(self) -> list[float]:
        if not self.config.text:
            return []
        return ability.token_losses(self.opened.model, self.opened.tokenizer, self.config.text)

    def _calibration(self, answers: asking.Asked | None) -> dict[str, Any]:
        """Each judge against people's labels; with enough of them also the corrected share of refusals."""
        found: dict[str, Any] = {}
        if answers is None or self.asker is None:
            return found
        if self.asker.first_token is not None:
            tokens = self.opened.tokenizer.convert_ids_to_tokens(list(self.asker.first_token.tokens))
            found["first_token"] = {"tokens": tokens, "threshold": self.asker.first_token.threshold}
        for judge in self.base.outcomes if self.labels else ():
            pairs = [
                (outcomes[place], self.labels[prompt.id, model])
                for model, outcomes in (("base", self.base.outcomes[judge]), ("adapter", answers.outcomes[judge]))
                for place, prompt in enumerate(self.prompts.prompts) if (prompt.id, model) in self.labels
            ]  # fmt: skip
            if len(pairs) < judges.LEAST_LABELS:
                found[f"{judge} against people"] = f"{len(pairs)} labels; {judges.LEAST_LABELS} are needed"
                continue
            agreement = judges.calibration([a for a, _ in pairs], [b for _, b in pairs])
            corrected = {
                model: statistics.corrected(
                    statistics.rate([o == "refusal" for o in outcomes]).value, agreement.sensitivity,
                    agreement.specificity,
                )
                for model, outcomes in (("base", self.base.outcomes[judge]), ("adapter", answers.outcomes[judge]))
            }  # fmt: skip
            found[f"{judge} against people"] = {**asdict(agreement), "corrected_refusals": corrected}
        return found

    def _items(self, answers: asking.Asked) -> list[dict[str, Any]]:
        rows = []
        for place, prompt in enumerate(self.prompts.prompts):
            row: dict[str, Any] = {"id": prompt.id, "kind": prompt.kind, "category": prompt.category}
            for model, asked in (("base", self.base), ("adapter", answers)):
                row |= {f"{model} {judge}": outcomes[place] for judge, outcomes in asked.outcomes.items()}
                row[f"{model} first token score"] = f"{asked.scores[place]:.3f}" if asked.scores else ""
            rows.append(row)
        return rows

    def _texts(self, answers: asking.Asked) -> list[dict[str, str]]:
        return [
            {"id": prompt.id, "prompt": prompt.text, "base": before.text, "adapter": after.text}
            for prompt, before, after in zip(self.prompts.prompts, self.base.answers, answers.answers, strict=True)
        ]

    def _settings(self) -> dict[str, Any]:
        import hashlib

        c = self.config
        template = "" if c.raw_prompts else str(self.opened.tokenizer.chat_template or "")
        return {
            "judges": list(c.judges), "phrases_version": judges.phrases_version(), "max_tokens": c.max_tokens,
            "system_prompt": bool(c.system), "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "dtype": str(self.opened.model.dtype).removeprefix("torch."), "quantization": c.quantization,
            "limits": {name: getattr(c, name) for name in (
                "max_refusal_drop", "max_over_refusal_rise", "max_ability_drop", "max_incoherent", "min_prompts",
                "judges_must_agree")},
            "versions": {name: metadata.version(name) for name in ("adapter-studio", "torch", "transformers", "peft")},
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    # ---------------------------------------------------------------- mitigation

    def mitigate(self, path: Path, folder: Path, passes: Any) -> Path:
        """A copy of the adapter in the library, pulled towards the aligned model."""
        from studio.library import adopt

        c = self.config
        file = self.adapted.read(path)
        source = {"sha256": library.sha256(path), "base": c.base}
        if c.mitigate == "scale":
            factor = mitigation.largest_passing(passes)
            made, told = mitigation.scaled(file, factor), {"mode": "scale", "factor": factor}
        else:
            assert self.twin is not None
            assert c.mitigate != "none"
            made, told = mitigation.project(file, self.weights, self.twin, c.mitigate, c.tau, c.undo_limit)
        label = Path(c.adapter).stem if Path(c.adapter).exists() else c.adapter
        free = adopt.free_name(c.name or f"{label} mitigated")
        written = mitigation.write(made, path, folder / free, {"source": source, **told})
        return library.resolve_adapter(library.import_adapter(written, free).name)

    def _refusals_pass(self, name: str, factor: float) -> bool:
        assert self.asker is not None
        if factor == 0:
            return True
        asked = self.asker.adapter(self.adapted, {name: factor}, self.monitor)
        return self._refusals(self._changes(asked)).status == "pass"

    def _changes(self, answers: asking.Asked) -> list[asking.Changes]:
        """By judge, the deciding one first."""
        return [asking.changes(self.prompts.prompts, self.base, answers, judge) for judge in self.base.outcomes]

    def _refusals(self, changes: Sequence[asking.Changes]) -> verdict.Check:
        c, first = self.config, changes[0]
        closed = ""
        if first.base_refusals.value < verdict.LEAST_REFUSALS:
            closed = f"the base itself refuses only {first.base_refusals.value:.0%} of them"
        return verdict.worse(
            "Refusals lost", "refusal_drop", first.refusals, -1, c.max_refusal_drop, c.min_prompts,
            closed or self._disagreement(changes, "refusals"),
        )  # fmt: skip
