"""The embedded vision-language model: a LLaVA that answers questions about emoji pictures.

``python -m assets.build.vlm --minutes 50 --decay-for 12`` trains it (minutes of CPU time; run again to go on),
``--export`` writes ``assets/models/tinysight`` with its scores on pictures drawn with other seeds.

A SigLIP vision tower looks at 64 x 64 pixels, a projector turns its 64 patches into tokens, a Llama reads them and the
question. The tower first learns which subject covers each of its patches (the head that tells it is thrown away), then
everything learns together to answer several questions per picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import assets
from adapters import files
from assets.build import data
from assets.build.common import build_dir, gradient_norm
from assets.build.text import general_words

NAME = "tinysight"
PATCH, WIDTH = 8, 128
PATCHES = (data.SIZE // PATCH) ** 2
VOCABULARY = 640
PAD, START, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
BATCH, TURNS = 48, 5
NUMBERS = ("one", "two", "three")
SIDES = {1: ("in the middle",), 2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}
IGNORED = -100

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Chat template in the wording of LLaVA 1.5."""


# ---------------------------------------------------------------- questions

Asked = tuple[str, str]
"""A question and its answer."""


def one_of(rng: Generator, *choices: str) -> str:
    """Pick one of the wordings."""
    return choices[int(rng.integers(len(choices)))]


def ask_what(scene: data.Scene, rng: Generator) -> Asked:
    """All subjects, from left to right."""
    names = [subject.concept for subject in scene.subjects]
    question = one_of(rng, "What is it?", "What is this?", "What is in the picture?", "What do you see?")
    return question, data.content_phrase(names, 6 if len(names) == 2 else 0)


def ask_side(scene: data.Scene, rng: Generator) -> Asked:
    """The subject on one side."""
    sides = SIDES[len(scene.subjects)]
    index = int(rng.integers(len(sides)))
    return f"What is {sides[index]}?", data.article(scene.subjects[index].concept)


def ask_where(scene: data.Scene, rng: Generator) -> Asked:
    """The side of one subject."""
    index = int(rng.integers(len(scene.subjects)))
    return f"Where is the {scene.subjects[index].concept}?", SIDES[len(scene.subjects)][index]


def ask_count(scene: data.Scene, rng: Generator) -> Asked:
    """How many subjects there are."""
    question = one_of(rng, "How many are there?", "How many icons are there?", "How many things are in the picture?")
    return question, NUMBERS[len(scene.subjects) - 1]


def ask_colour(scene: data.Scene, rng: Generator) -> Asked:
    """The colour of the background."""
    question = one_of(rng, "What colour is the background?", "What color is the background?", "What colour is behind?")
    return question, scene.background


def ask_style(scene: data.Scene, rng: Generator) -> Asked:
    """The style of the drawing."""
    return one_of(rng, "What style is it?", "What is the style?"), scene.style


def ask_whether(scene: data.Scene, rng: Generator) -> Asked:
    """Whether a subject is there; half the time it is."""
    names = [subject.concept for subject in scene.subjects]
    there = bool(rng.random() < 0.5)
    others = names if there else [name for name in data.BASE_CONCEPTS if name not in names]
    chosen = one_of(rng, *others)
    plural = chosen in data.PLURALS
    return f"{'Are' if plural else 'Is'} there {data.article(chosen)}?", "yes" if there else "no"


QUESTIONS: dict[str, Callable[[data.Scene, Generator], Asked]] = {
    "what": ask_what, "side": ask_side, "where": ask_where, "count": ask_count, "colour": ask_colour,
    "style": ask_style, "whether": ask_whether,
}  # fmt: skip
OFTEN = {"what": 0.3, "side": 0.2, "where": 0.1, "count": 0.08, "colour": 0.08, "style": 0.06, "whether": 0.18}
"""Share of each kind of question."""


def questions(scene: data.Scene, rng: Generator, turns: int) -> list[Asked]:
    """Ask ``turns`` questions about a scene; the kinds are drawn by :data:`OFTEN`."""
    kinds = rng.choice(len(OFTEN), turns, p=list(OFTEN.values()))
    return [QUESTIONS[list(OFTEN)[kind]](scene, rng) for kind in kinds]


# ---------------------------------------------------------------- tokens


def new_tokenizer(modules: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens: the words of the questions and answers whole, everything else in pieces."""
    rng = np.random.default_rng(7)
    lines = [f" {word}" for word in general_words(modules)]
    for _ in range(6000):
        for question, answer in questions(data.sample_scene(rng, (1, 1, 0.3)), rng, 3):
            lines.append(f"{USER} {question} {ASSISTANT} {answer}")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, START, END, IMAGE], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator(lines, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END, IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=512,
        extra_special_tokens={"image_token": IMAGE}, chat_template=TEMPLATE,
    )  # fmt: skip


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer from the build folder, else the shipped one, else a newly built one."""
    folder = build_dir() / NAME / "tokenizer"
    shipped = Path(assets.__file__).parent / "models" / NAME
    if not (folder / "tokenizer.json").is_file():
        if (shipped / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(shipped)
        new_tokenizer(data.fetch_packages(build_dir())).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@lru_cache(maxsize=20_000)
def ids(text: str) -> tuple[int, ...]:
    """Return the tokens of a piece of text."""
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def conversation(asked: Sequence[Asked]) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a picture and its questions: only answers and their ends are learnt."""
    image, end = ids(IMAGE)[0], ids(END)[0]
    tokens = [*ids(f"{USER} "), *[image] * PATCHES, *ids("\n")]
    labels = [IGNORED] * len(tokens)
    for number, (question, answer) in enumerate(asked):
        before = ids(f"{f'{USER} ' if number else ''}{question} {ASSISTANT}")
        told = (*ids(f" {answer}"), end)
        tokens += [*before, *told]
        labels += [*[IGNORED] * len(before), *told]
    return tokens, labels


# ---------------------------------------------------------------- pictures


def pixels(images: np.ndarray) -> Tensor:
    """Turn uint8 (B, 64, 64, 3) into what the vision tower takes: (B, 3, 64, 64) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def covered(scene: data.Scene) -> np.ndarray:
    """Say what covers each patch, row by row: int64 (64,), 0 for the background, else the subject's number + 1."""
    side = data.SIZE // PATCH
    across = (np.arange(side) + 0.5) / side
    names = list(data.BASE_CONCEPTS)
    found = np.zeros((side, side), np.int64)
    for subject in scene.subjects:
        away = np.hypot(across[None] - subject.x, across[:, None] - subject.y)
        found[away < max(0.5 * subject.size, 0.6 / side)] = names.index(subject.concept) + 1
    return found.reshape(-1)


class Pictures:
    """Endless training pictures: scenes with their renders and what covers each patch."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.sprites = data.load_sprites()

    def batch(self, size: int) -> tuple[list[data.Scene], Tensor, Tensor]:
        """Return ``size`` scenes, their pixels (B, 3, 64, 64) and patch subjects (B, 64)."""
        scenes = [data.sample_scene(self.rng, (50, 38, 12)) for _ in range(size)]
        made = np.stack([data.render(scene, self.sprites) for scene in scenes])
        return scenes, pixels(made), torch.from_numpy(np.stack([covered(scene) for scene in scenes]))


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Stack rows of different length, filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def batch_of(pictures: Pictures, size: int) -> dict[str, Tensor]:
    """Return one batch of conversations about pictures, with the patch subjects as ``covered``."""
    scenes, seen, places = pictures.batch(size)
    pairs = [conversation(questions(scene, pictures.rng, TURNS)) for scene in scenes]
    tokens, labels = padded([p[0] for p in pairs], ids(PAD)[0]), padded([p[1] for p in pairs], IGNORED)
    return {"input_ids": tokens, "labels": labels, "pixel_values": seen, "covered": places}


# ---------------------------------------------------------------- model


def new_model() -> LlavaForConditionalGeneration:
    """Return the untrained model: 5 vision layers and 3 language layers of width 128, 1.8 M parameters."""
    vision = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=5, num_attention_heads=4,
        image_size=data.SIZE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    words = tokenizer()
    language = LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=ids(START)[0],
        eos_token_id=ids(END)[0], pad_token_id=ids(PAD)[0],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=ids(IMAGE)[0], vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=PATCHES, tie_word_embeddings=True,
        projector_hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


class Student(nn.Module):
    """The model and the head that names what covers a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = new_model()
        self.head = nn.Linear(WIDTH, len(data.BASE_CONCEPTS) + 1)

    def patches(self, seen: Tensor) -> Tensor:
        """Return the patch features (B, 64, width) that the projector reads."""
        tower = self.model.model.vision_tower(seen, output_hidden_states=True)
        return tower.hidden_states[-1]  # type: ignore[no-any-return]

    def naming(self, features: Tensor, places: Tensor) -> Tensor:
        """Return the loss of naming patches; background patches count a fifth."""
        found = functional.cross_entropy(self.head(features).flatten(0, 1), places.flatten(), reduction="none")
        weight = torch.where(places.flatten() == 0, 0.2, 1.0)
        return (found * weight).sum() / weight.sum()

    def forward(self, batch: dict[str, Tensor], answering: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of naming patches and that of answering (zero unless ``answering``)."""
        features = self.patches(batch["pixel_values"])
        naming = self.naming(features, batch["covered"])
        if not answering:
            return naming, torch.zeros(())
        inner = self.model.model
        words = inner.language_model.embed_tokens(batch["input_ids"])
        where = (batch["input_ids"] == self.model.config.image_token_id)[..., None]
        words = words.masked_scatter(where, inner.multi_modal_projector(features).to(words.dtype))
        told = inner.language_model(inputs_embeds=words).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        learnt = labels != IGNORED
        return naming, functional.cross_entropy(self.model.lm_head(told[learnt]), labels[learnt])


class Both(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for everything else, as in :mod:`assets.build.flow`."""

    def __init__(self, student: Student) -> None:
        named = list(student.named_parameters())
        inside = [p for n, p in named if p.ndim == 2 and (".layers." in n or "projector" in n)]
        chosen = {id(p) for p in inside}
        rest = [p for _, p in named if id(p) not in chosen]
        muon = torch.optim.Muon(inside, lr=0.0, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Make both steps."""
        for part in self.parts:
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts for group in part.param_groups]


# ---------------------------------------------------------------- training


def checkpoint() -> Path:
    """Return where the state of the training lies."""
    return build_dir() / NAME / "checkpoint.pt"


def train(minutes: float, naming_for: float, decay_for: float, peak: float, at_most: float) -> bool:
    """Train until ``minutes`` of CPU time are spent in all, or ``at_most`` in this call; a checkpoint every minute.

    Returns whether the training is complete.

    The first ``naming_for`` minutes only patches are named; over the last ``decay_for`` minutes the learning rate falls
    from ``peak`` to zero.
    """
    student = Student()
    optimizer = Both(student)
    spent, step, curve = 0.0, 0, []
    if checkpoint().is_file():
        state = torch.load(checkpoint(), weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step, curve = state["seconds"], state["step"], state["curve"]
    pictures = Pictures(1000 + step)  # a resumed run sees new pictures
    begun, saved, told = time.process_time() - spent, spent, {"naming": 0.0, "answering": 0.0, "count": 0}
    student.train()

    def keep() -> None:
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "seconds": spent, "step": step,
                 "curve": curve}  # fmt: skip
        files.write(checkpoint(), lambda part: torch.save(state, part))

    stop = min(60 * minutes, spent + 60 * at_most)
    while spent < stop:
        rate = peak * min(1.0, (step + 1) / 100, max(0.0, (60 * minutes - spent) / (60 * decay_for)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        answering = spent > 60 * naming_for
        with torch.autocast("cpu", torch.bfloat16):
            naming, answers = student(batch_of(pictures, BATCH), answering)
            loss = 0.3 * naming + answers if answering else naming
        optimizer.zero_grad()
        loss.backward()
        gradient_norm(list(student.parameters()), 1.0)
        optimizer.step()
        step, spent = step + 1, time.process_time() - begun
        for name, loss_of in (("naming", naming), ("answering", answers), ("count", torch.ones(()))):
            told[name] += float(loss_of.detach())
        if step % 50 == 0:
            means = [told["naming"] / told["count"], told["answering"] / told["count"]]
            curve.append([step, round(spent), *(round(value, 4) for value in means)])
            print(f"step {step}  {spent / 60:.1f} min  naming {means[0]:.3f}  answering {means[1]:.3f}  lr {rate:.2g}",
                  flush=True)  # fmt: skip
            told = {"naming": 0.0, "answering": 0.0, "count": 0}
        if spent - saved > 60:
            saved = spent
            keep()
    keep()
    return spent >= 60 * minutes


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--naming-for", type=float, default=12)
    parser.add_argument("--decay-for", type=float, default=12)
    parser.add_argument("--at-most", type=float, default=1e9, help="minutes of this call; run again to go on")
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args(arguments)
    done = train(options.minutes, options.naming_for, options.decay_for, options.rate, options.at_most)
    print("complete" if done else "run again to go on")


if __name__ == "__main__":
    main()
