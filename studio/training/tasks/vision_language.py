"""Vision-language: a model learns to answer questions about pictures; its language model gets the adapter.

The vision tower and the projector are never touched. Only answers are learnt. The processor of the base writes the
picture's tokens and makes the pixels, for every batch anew, so that pictures of any number and size fit any base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.errors import InputError
from adapters.plugin import Plugin
from adapters.progress import Monitor, Progress, check
from pipelines import pictures
from pipelines.multimodal.adapters import read_under
from pipelines.multimodal.answer import answer, processed
from pipelines.multimodal.loading import VisionLanguageModel, open_model
from pipelines.multimodal.messages import PLACE, with_pictures
from studio.datasets.conversations import LEARN
from studio.datasets.encoding import IGNORED, grow, with_end
from studio.datasets.picture_questions import Pictured
from studio.datasets.seeds import global_seed
from studio.jobs.kinds import Kind
from studio.training.drivers import trainer as driver
from studio.training.drivers.trainer import Batch
from studio.training.language import rows
from studio.training.language.card import card
from studio.training.language.data import Samples
from studio.training.language.layers import add_adapter
from studio.training.language.measure import measure, resting
from studio.training.schemas.vision_language import TrainVisionLanguageConfig
from studio.training.session import SILENT, Keep, TrainSession
from studio.training.task import Measures
from studio.training.tasks.language import LanguageTask
from studio.training.trainer_mixin import COMPONENT

KIND = Kind(
    "train-vision-language", "studio.training.schemas.vision_language:TrainVisionLanguageConfig",
    "studio.training.tasks.vision_language:run", continues=True, ready="studio.training.ready:vision_language",
    afterwards="studio.library.adopt:trained", title="Vision-language", train="vision-language",
    help="Train a LoRA of a vision-language model from pictures with questions and answers.",
    example="studio train vision-language --data questions.jsonl --name sights",
)  # fmt: skip

SHOWN = 3
"""Rows whose questions are answered during a training that names no sample prompts."""


def run(
    config: TrainVisionLanguageConfig,
    folder: Path,
    monitor: Monitor = SILENT,
    resume: bool = False,
    plugins: Sequence[Plugin] = (),
    keep: Keep = False,
) -> dict[str, Any]:
    """Train the adapter that ``config`` describes in ``folder``; arguments and result as of a language training.

    Raises:
        InputError: something that cannot be trained, in one sentence.
        Cancelled: stopped on request; a checkpoint to resume from was written.
    """
    return driver.train(TrainSession.of(VisionLanguageTask(config), folder, monitor, plugins), resume, keep)


@dataclass(frozen=True)
class Asked:
    """A question of the samples: the picture, its name for people, the question and the answer if it is known."""

    picture: Any
    name: str
    question: str
    expected: str = ""


class VisionLanguageTask(LanguageTask):
    """A vision-language model and rows of pictures with conversations."""

    data_noun = "rows"
    peft_type = "CAUSAL_LM"
    fits = staticmethod(read_under)
    auto_class = "AutoModelForImageTextToText"
    pipeline_tag = "image-text-to-text"
    asking = (
        'parts = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,',
        '    return_tensors="pt",',
        ")",
        "made = model.generate(**inputs, max_new_tokens=20)",
        'print(processor.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    )
    shifted = True

    config: Any  # the language tasks' fields that are used here have the same names
    base: VisionLanguageModel

    # ---------------------------------------------------------------- before the first step
    def rows(self) -> None:
        self.read = rows.pictured(self.config)

    def open(self, session: TrainSession) -> None:
        from studio import library

        self.session, config = session, self.config
        self.base = open_model(
            library.resolve_vision_language(config.base), dtype=config.dtype, device=session.device,
            attention=config.attention, quantization=config.quantization,
        )  # fmt: skip
        self.base.model.config.use_cache = False

    def inject(self, models: dict[str, Any]) -> dict[str, Any]:
        self.learner = add_adapter(models[COMPONENT], self.config, (), self.peft_type, self.base.language)
        frozen = (p for p in models[COMPONENT].parameters() if not p.requires_grad)
        self.session.dtype = next(p.dtype for p in frozen if p.is_floating_point())
        return {COMPONENT: self.learner}

    def encode(self) -> None:
        config = self.config
        longest = min(config.max_length, self.base.longest or config.max_length)
        shown, remarks = self._encoded(self.read.shown, longest)
        held_out = self._encoded(self.read.held_out, longest)[0] if self.read.held_out else []
        self.data = Samples(shown, held_out, "; ".join([*self.read.remarks, *remarks]))
        self.samples, self.data_digest = shown, self._digest()
        self.collator = Collate(self.base, {item.number: item for item in (*self.read.shown, *self.read.held_out)})
        if self.config.validation_data:  # both files count from 1
            self.held_collator = Collate(self.base, {item.number: item for item in self.read.held_out})
        else:
            self.held_collator = self.collator
        self.total = config.steps
        if config.epochs:
            self.total = math.ceil(config.epochs * len(self.samples) / self.samples_per_step)
        self.session.monitor.report(Progress("data", message=self._summary()))

    def _encoded(self, items: Sequence[Pictured], longest: int) -> tuple[list[Any], list[str]]:
        """Samples of rows, and sentences on what was left out."""
        made, too_long, unreadable, ended = [], [], [], []
        for count, item in enumerate(items, 1):
            check(self.session.monitor)
            try:
                sample, end_added = encode(self.base, item)
            except pictures.PictureError as error:
                if not self.config.skip_broken:
                    raise InputError(f"Row {item.number}: {error}") from None
                unreadable.append(item.number)
                continue
            if end_added:
                ended.append(item.number)
            if len(sample["input_ids"]) > longest:
                if self.config.too_long == "refuse":
                    raise InputError(
                        f"Row {item.number} has {len(sample['input_ids'])} tokens with its pictures, at most {longest} "
                        "are read: raise max_length, or set too_long to 'skip'."
                    )
                too_long.append(item.number)
                continue
            made.append(sample)
            if count % 50 == 0:
                self.session.monitor.report(Progress("data", count, len(items), message="reading pictures"))
        if not made:
            raise InputError(
                f"No row is left to train on: {len(too_long)} are longer than {longest} tokens with their pictures, "
                f"{len(unreadable)} have unreadable ones. Raise max_length, or correct the rows."
            )
        found = {
            f"rows longer than {longest} tokens with their pictures are left out": too_long,
            "rows with unreadable pictures are left out": unreadable,
            "rows get an end token, since the chat template writes none": ended,
        }
        return made, [f"{len(numbers)} {sentence}" for sentence, numbers in found.items() if numbers]

    def _digest(self) -> str:
        import hashlib

        total = hashlib.sha256(self.read.digest.encode())
        for item in (*self.read.shown, *self.read.held_out):
            for picture in item.pictures:
                total.update(picture.digest().encode())
        return total.hexdigest()

    # ---------------------------------------------------------------- steps
    def held_out(self) -> Iterator[Batch]:
        size = self.config.batch_size
        for start in range(0, len(self.data.held_out), size):
            yield self.held_collator(self.data.held_out[start : start + size])

    def measure(self) -> Measures:
        """Loss and share of right tokens, and the share of held-out answers that are exactly the expected words."""
        autocast = self.session.accelerator.autocast
        found, _ = measure(self._model, self.held_out(), shifted=True, autocast=autocast)
        known = {sample["number"] for sample in self.data.held_out}
        rows = [item for item in self.read.held_out if item.number in known][: self.config.validation_answers]
        right = [exact for item in rows for exact in self._exact(item)]
        return {**found, "exact_answers": sum(right) / len(right)} if right else found

    def _exact(self, item: Pictured) -> Iterator[bool]:
        """Whether each answer of a row, after the true conversation before it, is exactly the expected one."""
        opened = [picture.open() for picture in item.pictures]
        for position, message in enumerate(item.talk.messages):
            if message["role"] == "assistant" and message.get(LEARN, True) and position:
                before = item.talk.messages[:position]
                seen = opened[: sum(turn["content"].count(PLACE) for turn in before)]
                yield same_words(self._said(before, seen), message["content"])

    def _said(self, messages: Sequence[Mapping[str, Any]], seen: Sequence[Any]) -> str:
        model = self._model
        model.config.use_cache = True
        try:
            with resting(model), torch.no_grad(), self.session.accelerator.autocast():
                return answer(self.base, model, messages, seen, self.config.sample_tokens)
        finally:
            model.config.use_cache = False

    # ---------------------------------------------------------------- looking and saving
    @property
    def samples_wanted(self) -> bool:
        return True

    def sample(self, step: int) -> None:
        """Answers to the sample questions, added to ``answers.jsonl`` with the picture and the expected answer."""
        session = self.session
        for asked in self._questions():
            with global_seed(self.config.seed, "answers"):
                said = self._said([{"role": "user", "content": f"{PLACE}{asked.question}"}], [asked.picture])
            line = {"step": step, "prompt": f"{asked.name}: {asked.question}", "answer": said}
            if asked.expected:
                line["expected"] = asked.expected
            with self._answers.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            session.monitor.report(
                Progress("answering", step, self.total, message=f"{asked.name}: {asked.question} → {said}")
            )

    def _questions(self) -> Iterable[Asked]:
        if self.config.sample_prompts:
            for prompt in self.config.sample_prompts:
                place, _, question = prompt.partition(": ")
                yield Asked(pictures.open_picture(Path(place).expanduser()), Path(place).name, question)
            return
        for item in (self.read.held_out or self.read.shown)[:SHOWN]:
            if found := first_question(item):
                yield found

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        _, data = super().facts()
        data["digest"] = self.data_digest
        return {"family": "vision-language", "architecture": self.base.architecture}, data

    def _card(self, recipe: dict[str, Any]) -> str:
        return card(recipe, self.auto_class, self.pipeline_tag, self.asking, ("processor", "AutoProcessor"))


def first_question(item: Pictured) -> Asked | None:
    """The first question of a row about one picture, with its answer; None for other rows."""
    messages = [message for message in item.talk.messages if message["role"] != "system"]
    if len(messages) < 2 or len(item.pictures) != 1 or PLACE not in messages[0]["content"]:
        return None
    picture = item.pictures[0]
    question = messages[0]["content"].replace(PLACE, "").strip()
    return Asked(picture.open(), picture.name or f"row {item.number}", question, messages[1]["content"])


def same_words(said: str, expected: str) -> bool:
    """Whether two answers are the same but for case and white space."""
    return " ".join(said.split()).casefold() == " ".join(expected.split()).casefold()


def encode(base: VisionLanguageModel, item: Pictured) -> tuple[dict[str, Any], bool]:
    """A row as tokens with labels (-100 where nothing is learnt), and whether an end token was added.

    The processor writes growing parts of the conversation, so any base works whose chat template does not change
    earlier turns.

    Raises:
        PictureError: a picture cannot be read.
        InputError: the chat template refuses the row, or rewrites earlier turns.
    """
    talk = with_pictures(_written(item), [picture.open() for picture in item.pictures])
    ids: list[int] = []
    learnt: list[bool | None] = []
    for position, message in enumerate(item.talk.messages):
        if message["role"] != "assistant":
            continue
        if not position:
            raise InputError(f"Row {item.number} begins with the assistant: begin it with a question.")
        ids, learnt = grow(ids, learnt, _tokens(base, talk[:position], True), False, item.talk)
        mine = True if message.get(LEARN, True) else None
        ids, learnt = grow(ids, learnt, _tokens(base, talk[: position + 1], False), mine, item.talk)
    ids, learnt, ended = with_end(item.talk, ids, learnt, base.tokenizer)
    labels = [token if mine else IGNORED for token, mine in zip(ids, learnt, strict=True)]
    return {"input_ids": ids, "labels": labels, "number": item.number}, ended


def _written(item: Pictured) -> list[dict[str, Any]]:
    """The messages without the mark of what is learnt, which templates do not see, up to the last answer."""
    last = max(n for n, message in enumerate(item.talk.messages) if message["role"] == "assistant")
    return [{key: value for key, value in m.items() if key != LEARN} for m in item.talk.messages[: last + 1]]


def _tokens(base: VisionLanguageModel, talk: Sequence[Mapping[str, Any]], answer_next: bool) -> list[int]:
    ids: list[int] = processed(base.processor, [talk], answer_next)["input_ids"][0].tolist()
    return ids


class Collate:
    """A batch of samples: their tokens padded on the right, and what the processor makes of their pictures.

    Args:
        rows: the rows by number; pictures are opened when a batch needs them.
    """

    def __init__(self, base: VisionLanguageModel, rows: Mapping[int, Pictured]) -> None:
        self.base, self.rows = base, rows

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        items = [self.rows[sample["number"]] for sample in samples]
        talks = [with_pictures(_written(item), [picture.open() for picture in item.pictures]) for item in items]
        made = processed(self.base.processor, talks, False)
        longest = max(len(sample["input_ids"]) for sample in samples)
        written = made["input_ids"].shape
        batch = {
            name: _longer(value, longest) if value.shape == written else value
            for name, value in made.items()
            if name not in ("input_ids", "attention_mask")
        }
        pad = self.base.tokenizer.pad_token_id
        batch["input_ids"] = _padded([sample["input_ids"] for sample in samples], longest, pad)
        batch["labels"] = _padded([sample["labels"] for sample in samples], longest, IGNORED)
        batch["attention_mask"] = _padded([[1] * len(sample["input_ids"]) for sample in samples], longest, 0)
        kind = self.base.model.dtype
        return {name: value.to(kind) if value.is_floating_point() else value for name, value in batch.items()}


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _longer(value: torch.Tensor, length: int) -> torch.Tensor:
    """A value per token, with zeros for an end token that the chat template does not write."""
    return torch.nn.functional.pad(value, (0, length - value.shape[1]))
