"""Speech: a Whisper learns to write down recordings; its encoder and decoder get the adapter.

The text follows the fixed prefix (start, language, task, no times), of which nothing is learnt; the end token is. The
sound becomes log-mel features for every batch anew, which are kept in memory as far as there is room.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.errors import InputError
from adapters.plugin import Plugin
from adapters.progress import Monitor, Progress, check
from pipelines.speech import audio
from pipelines.speech.audio import RATE
from pipelines.speech.loading import SpeechModel, open_model
from pipelines.speech.scores import score
from pipelines.speech.transcribe import features_of, said
from studio.datasets.encoding import IGNORED
from studio.datasets.utterances import Utterance
from studio.jobs.kinds import Kind
from studio.training.drivers import trainer as driver
from studio.training.drivers.trainer import Batch
from studio.training.language import rows
from studio.training.language.card import card
from studio.training.language.data import Samples
from studio.training.language.layers import add_adapter
from studio.training.language.measure import measure, resting
from studio.training.schemas.speech import TrainSpeechConfig
from studio.training.session import SILENT, TrainSession
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask
from studio.training.trainer_mixin import COMPONENT

KIND = Kind(
    "train-speech", "studio.training.schemas.speech:TrainSpeechConfig", "studio.training.tasks.speech:run",
    continues=True, ready="studio.training.ready:speech", afterwards="studio.library.adopt:trained", title="Speech",
    train="speech", help="Train a LoRA of a Whisper from recordings with texts.",
    example="studio train speech --data recordings/ --validation-split 0.1 --name voice",
)  # fmt: skip

SHOWN = 3
"""Recordings written down during a training that names no sample prompts."""

KEPT = 2**30
"""Bytes of features that are kept in memory."""

AT_A_TIME = 8
"""Recordings that are written down together."""


def run(
    config: TrainSpeechConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: bool | int = False,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``; arguments and result as of a language training.

    ``validation`` begins with the measures of the base alone, at step 0.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(SpeechTask(config), folder, monitor, plugins), resume, keep)


class SpeechTask(LanguageTask):
    """A Whisper and recordings with texts."""

    data_noun = "recordings"
    peft_type = None  # PEFT's model for sequences to sequences hands on arguments that Whisper does not take
    auto_class = "AutoModelForSpeechSeq2Seq"
    pipeline_tag = "automatic-speech-recognition"
    asking = (
        "samples = ...  # one channel at 16 kHz, an array of floats",
        'inputs = processor(samples, sampling_rate=16_000, return_tensors="pt")',
        "print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])",
    )

    config: Any  # the language tasks' fields that are used here have the same names
    base: SpeechModel

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.read = rows.spoken(self.config)

    def open(self, session: TrainSession) -> None:
        from studio import library

        self.session, config = session, self.config
        self.base = open_model(
            library.resolve_speech(config.base), dtype=config.dtype, device=session.device,
            attention=config.attention, quantization=config.quantization, window=config.window,
        )  # fmt: skip
        self.base.model.config.use_cache = False
        self.prefix = self.base.prefix(config.language, config.task)

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        self.learner = add_adapter(models[COMPONENT], self.config, (), self.peft_type)
        frozen = (p for p in models[COMPONENT].parameters() if not p.requires_grad)
        self.session.dtype = next(p.dtype for p in frozen if p.is_floating_point())
        return {COMPONENT: self.learner}

    def encode(self) -> None:
        config = self.config
        shown, remarks, self.seconds = self._encoded(self.read.shown)
        held_out = self._encoded(self.read.held_out)[0] if self.read.held_out else []
        self.data = Samples(shown, held_out, "; ".join([*self.read.remarks, *remarks]))
        self.samples, self.data_digest = shown, self._digest()
        self.collator = Collate(self.base, self.prefix)
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples) / self.samples_per_step)
        self.session.monitor.report(Progress("data", message=self._summary()))

    def _encoded(self, items: Sequence[Utterance]) -> tuple[list[Any], list[str], float]:
        """Samples of recordings, sentences on what was left out or changed, and their length in seconds."""
        made: list[Any] = []
        left_out: dict[str, list[str]] = {}
        changed: set[str] = set()
        seconds = 0.0
        for count, item in enumerate(items, 1):
            check(self.session.monitor)
            try:
                sound = item.open()
            except InputError as error:
                if not self.config.skip_broken:
                    raise InputError(f"Recording {item.number} ('{item.name}'): {error}") from None
                left_out.setdefault("recordings are unreadable and left out", []).append(item.name)
                continue
            ids = self._tokens(item)
            if reason := self._too_long(item, sound, ids):
                if self.config.too_long == "refuse":
                    raise InputError(
                        f"Recording {item.number} ('{item.name}') {reason}: cut it, or set too_long to 'skip'."
                    )
                left_out.setdefault("recordings are too long and left out", []).append(item.name)
                continue
            changed.update(remark.split(" from")[0] for remark in sound.remarks)
            seconds += sound.seconds
            made.append({"input_ids": ids, "number": item.number, "item": item})
            if count % 50 == 0:
                self.session.monitor.report(Progress("data", count, len(items), message="reading recordings"))
        if not made:
            raise InputError(f"No recording is left to learn from: {_told(left_out)}.")
        remarks = [f"{len(names)} {sentence} ({', '.join(names[:3])})" for sentence, names in left_out.items()]
        return made, [*remarks, *sorted(changed)], seconds

    def _tokens(self, item: Utterance) -> list[int]:
        """The text and the end token; a text begins with a space, as Whisper writes it."""
        tokenizer = self.base.tokenizer
        ids = tokenizer(f" {item.text}", add_special_tokens=False).input_ids
        return [*ids, tokenizer.eos_token_id]

    def _too_long(self, item: Utterance, sound: audio.Sound, ids: Sequence[int]) -> str:
        if sound.seconds > self.base.window:
            return f"is {sound.seconds:.1f} s long, and the model hears {self.base.window:g} s"
        if len(self.prefix) + len(ids) > self.base.longest:
            return f"has a text of {len(ids)} tokens, and the model writes {self.base.longest} with its prefix"
        return ""

    def _summary(self) -> str:
        shown = f"{len(self.samples)} recordings, {self.seconds / 60:.1f} minutes"
        kept = f"{len(self.data.held_out)} held out" if self.data.held_out else ""
        return "; ".join(filter(None, [shown, kept, self.data.remark]))

    def _digest(self) -> str:
        import hashlib

        total = hashlib.sha256(self.read.digest.encode())
        for item in (*self.read.shown, *self.read.held_out):
            total.update(item.digest().encode())
        return total.hexdigest()

    def before_first(self) -> None:
        """Measure the base alone, so that the adapter can be compared with it."""
        if self.measurable:
            self.session.measure()

    # ---------------------------------------------------------------- steps
    def measure(self) -> Measures:
        """Loss and share of right tokens; word and character errors of the first ``validation_answers`` recordings."""
        autocast = self.session.accelerator.autocast
        found, _ = measure(self._model, self.held_out(), autocast=autocast)
        items = self._items(self.data.held_out)[: self.config.validation_answers]
        if not items:
            return found
        counted = score(
            [item.text for item in items], self._said([item.open().samples for item in items]),
            self.config.language or "en", self.base.tokenizer,
        )  # fmt: skip
        return {**found, "wer": counted.wer, "cer": counted.cer, "loops": counted.loops}

    def _items(self, samples: Sequence[Mapping[str, Any]]) -> list[Utterance]:
        return [sample["item"] for sample in samples]

    def _said(self, sounds: Sequence[np.ndarray[Any, Any]]) -> list[str]:
        model, texts = self._model, []
        asked: dict[str, Any] = {}
        if self.base.multilingual:
            code = self.base.language_name(self.config.language or "en").strip("<|>")
            asked = {"language": code, "task": self.config.task}
        model.config.use_cache = True
        try:
            with resting(model), torch.no_grad(), self.session.accelerator.autocast():
                for start in range(0, len(sounds), AT_A_TIME):
                    check(self.session.monitor)
                    texts += said(self.base, model, list(sounds[start : start + AT_A_TIME]), asked)
        finally:
            model.config.use_cache = False
        return texts

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        return True

    def sample(self, step: int) -> None:
        """Transcripts of the sample recordings, added to ``answers.jsonl`` with what was really said."""
        asked = [(Path(place).name, audio.read(Path(place).expanduser()), "") for place in self.config.sample_prompts]
        if not asked:
            shown = self._items(self.data.held_out or self.data.shown)[:SHOWN]
            asked = [(item.name, item.open(), item.text) for item in shown]
        longest = round(self.base.window * RATE)
        texts = self._said([sound.samples[:longest] for _, sound, _ in asked])
        for (name, _, expected), text in zip(asked, texts, strict=True):
            line = {"step": step, "prompt": name, "answer": text} | ({"expected": expected} if expected else {})
            with self._answers.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.session.monitor.report(Progress("answering", step, self.total, message=f"{name} → {text}"))

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        source = Path(self.config.data)
        data = {
            "source": source.name, "rows": len(self.data.shown), "held_out": len(self.data.held_out),
            "digest": self.data_digest, "seconds": round(self.seconds, 2), "labels": [],
        }  # fmt: skip
        return {"family": "speech", "architecture": self.base.architecture, "window": self.base.window}, data

    def _card(self, recipe: dict[str, Any]) -> str:
        return card(recipe, self.auto_class, self.pipeline_tag, self.asking, ("processor", "AutoProcessor"), "speech")


def _told(left_out: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{len(names)} {sentence}" for sentence, names in left_out.items()) or "there is none"


class Collate:
    """A batch of samples: features of their sounds, and their tokens behind the prefix, padded on the right."""

    def __init__(self, base: SpeechModel, prefix: Sequence[int]) -> None:
        self.base, self.prefix = base, list(prefix)
        self._kept: dict[int, torch.Tensor] = {}
        self._bytes = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        pad = self.base.tokenizer.pad_token_id
        written = [[*self.prefix, *sample["input_ids"]] for sample in samples]
        longest = max(map(len, written)) - 1
        given = [[*ids[:-1], *[pad] * (longest - len(ids) + 1)] for ids in written]
        hidden = [IGNORED] * (len(self.prefix) - 1)
        labels = [[*hidden, *sample["input_ids"]] for sample in samples]
        return {
            "input_features": torch.stack([self._features(sample) for sample in samples]),
            "decoder_input_ids": torch.tensor(given),
            "labels": torch.tensor([[*ids, *[IGNORED] * (longest - len(ids))] for ids in labels]),
        }

    def _features(self, sample: Mapping[str, Any]) -> torch.Tensor:
        key = id(sample["item"])
        if key in self._kept:
            return self._kept[key]
        made = features_of(self.base, [sample["item"].open().samples])["input_features"][0].cpu()
        if self._bytes + made.nbytes <= KEPT:
            self._kept[key] = made
            self._bytes += made.nbytes
        return made
