"""The embedded vision-language model: a LLaVA that answers questions about emoji pictures.

``python -m assets.build.vlm --minutes 50 --decay-for 12`` trains it (minutes of CPU time; run again to go on),
``--export`` writes ``assets/models/tinysight`` with its scores on pictures drawn with other seeds. Without a
checkpoint, ``--from-shipped`` goes on from the weights, minutes and steps of ``assets/models/tinysight``.

A SigLIP vision tower looks at 64 x 64 pixels, a projector turns its 64 patches into tokens, a Llama reads them and the
question. The tower first learns which subject covers each of its patches (the head that tells it is thrown away), then
everything learns together to answer several questions per picture.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

import assets
from adapters import files
from assets.build import data
from assets.build.common import Both, build_dir, gradient_norm, write_json
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


@lru_cache(maxsize=1)
def spelled() -> tuple[str, ...]:
    """Return the words that the model is asked to say: every token of the vocabulary occurs in an answer that way."""
    return tuple(sorted({word for word in general_words(data.fetch_packages(build_dir())) if len(word) > 2}))


def ask_say(scene: data.Scene, rng: Generator) -> Asked:
    """A word to repeat, whatever the picture shows."""
    word = spelled()[int(rng.integers(len(spelled())))]
    return f"Say {word}.", word


QUESTIONS: dict[str, Callable[[data.Scene, Generator], Asked]] = {
    "what": ask_what, "side": ask_side, "where": ask_where, "count": ask_count, "colour": ask_colour,
    "style": ask_style, "whether": ask_whether, "say": ask_say,
}  # fmt: skip
OFTEN = {
    "what": 0.25, "side": 0.17, "where": 0.09, "count": 0.06, "colour": 0.07, "style": 0.06, "whether": 0.15,
    "say": 0.15,
}  # fmt: skip
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


def inside_layers(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix inside the layers or the projector."""
    return ".layers." in name or "projector" in name


# ---------------------------------------------------------------- training


def checkpoint() -> Path:
    """Return where the state of the training lies."""
    return build_dir() / NAME / "checkpoint.pt"


def shipped(student: Student) -> tuple[float, int, list[Any]]:
    """Put the shipped weights into ``student``; return the seconds, steps and curve of their training.

    The head that names patches is not shipped and starts anew, as the optimizer does.
    """
    folder = assets.path(f"models/{NAME}")
    found = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    student.model.load_state_dict(found.state_dict())
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return 60 * facts["minutes"], facts["steps"], facts["curve"]


def train(
    minutes: float, naming_for: float, decay_for: float, peak: float, at_most: float, from_shipped: bool = False
) -> bool:
    """Train until ``minutes`` of CPU time are spent in all, or ``at_most`` in this call; a checkpoint every minute.

    Returns whether the training is complete.

    The first ``naming_for`` minutes only patches are named; over the last ``decay_for`` minutes the learning rate falls
    from ``peak`` to zero.
    """
    student = Student()
    optimizer = Both(student, inside_layers, fused=None)
    spent, step, first, curve = 0.0, 0, 0, []
    if checkpoint().is_file():
        state = torch.load(checkpoint(), weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step, first, curve = state["seconds"], state["step"], state.get("first", 0), state["curve"]
    elif from_shipped:
        spent, step, curve = shipped(student)
        first = step
    pictures = Pictures(1000 + step)  # a resumed run sees new pictures
    begun, saved, told = time.process_time() - spent, spent, {"naming": 0.0, "answering": 0.0, "count": 0}
    student.train()

    def keep() -> None:
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "seconds": spent, "step": step,
                 "first": first, "curve": curve}  # fmt: skip
        files.write(checkpoint(), lambda part: torch.save(state, part))

    stop, asked = min(60 * minutes, spent + 60 * at_most), Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())  # an interrupted run keeps what it has learnt
    signal.signal(signal.SIGINT, lambda *_: asked.set())
    while spent < stop and not asked.is_set():
        rate = peak * min(1.0, (step - first + 1) / 100, max(0.0, (60 * minutes - spent) / (60 * decay_for)))
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


# ---------------------------------------------------------------- export and scores

HELD_OUT = 9_000_000
"""Seeds of pictures for the scores begin here; training never sees them."""

EXAMPLES = (
    (("dog", "banana"), "white", "cartoon", "What is on the left?"),
    (("rose",), "blue", "flat", "What is it?"),
    (("cat", "car"), "yellow", "bold", "How many are there?"),
)
"""Subjects, background, style and question of the pictures that the page offers."""


def export(target: Path, per_kind: int) -> None:
    """Write the model in transformers' LLaVA format with fp16 weights, its scores, examples and card."""
    student = Student()
    state = torch.load(checkpoint(), weights_only=True)
    student.load_state_dict(state["student"])
    with files.whole(target) as part:
        part.mkdir()
        student.model.half().save_pretrained(part)
        new_processor().save_pretrained(part)
        write_examples(part / "examples")
        scores = evaluate(part, per_kind)
        write_json(part / "scores.json", scores)
        facts = {"steps": state["step"], "minutes": round(state["seconds"] / 60, 1), "batch": BATCH, "turns": TURNS,
                 "curve": state["curve"]}  # fmt: skip
        write_json(part / "training.json", facts)
        files.write_text(part / "README.md", card(scores, facts, sum(p.numel() for p in student.model.parameters())))


def new_processor() -> LlavaProcessor:
    """Return the processor: pictures squeezed to 64 x 64, values from -1 to 1, 64 tokens each."""
    return LlavaProcessor(
        SiglipImageProcessor(size={"height": data.SIZE, "width": data.SIZE}), tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=TEMPLATE,
    )  # fmt: skip


def write_examples(folder: Path) -> None:
    """Render :data:`EXAMPLES` with the list that the page reads."""
    rng, sprites, listed = np.random.default_rng(HELD_OUT), data.load_sprites(), []
    for subjects, background, style, question in EXAMPLES:
        scene = data.Scene(style, data.place(rng, subjects), background, "")
        name = "-".join(subjects) + ".png"
        data.save_png(folder / name, data.render(scene, sprites, 4 * data.SIZE))
        listed.append({"picture": name, "question": question})
    write_json(folder / "examples.json", listed)


@torch.no_grad()
def evaluate(folder: Path, per_kind: int) -> dict[str, Any]:
    """Ask the exported model, through transformers alone, about pictures that it never saw.

    Returns right answers (exactly the expected words) and questions per kind and number of subjects; ``unseen style``
    asks what one subject is in the two styles that are not in the training.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    sprites, scores = data.load_sprites(), {}
    for number, (kind, ask) in enumerate({**QUESTIONS, "unseen style": ask_what}.items()):
        rng = np.random.default_rng(HELD_OUT + 1 + number)
        counts = (1, 0, 0) if kind == "unseen style" else (50, 38, 12)
        styles = tuple(data.HELD_STYLES if kind == "unseen style" else data.BASE_STYLES)
        scenes = [data.sample_scene(rng, counts, styles) for _ in range(per_kind)]
        asked = [ask(scene, rng) for scene in scenes]
        said: list[str] = []
        for start in range(0, per_kind, 50):
            images = [Image.fromarray(data.render(scene, sprites)) for scene in scenes[start : start + 50]]
            texts = [f"{USER} {IMAGE}\n{question} {ASSISTANT}" for question, _ in asked[start : start + 50]]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            said += processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [text.strip() == answer for text, (_, answer) in zip(said, asked, strict=True)]
        scores[kind] = {"right": sum(right), "questions": per_kind}
        for subjects in (1, 2, 3):
            chosen = [ok for ok, scene in zip(right, scenes, strict=True) if len(scene.subjects) == subjects]
            scores[kind][f"with {subjects}"] = [sum(chosen), len(chosen)]
    return scores


ASKED = {
    "what": "what is it? (all subjects, in order)", "side": "what is on the left, in the middle, on the right?",
    "where": "where is ...?", "count": "how many?", "colour": "what colour is the background?",
    "style": "what style is it?", "whether": "is there ...? (half of them: no)",
    "say": "say ... (a word to repeat)", "unseen style": "what is it? (one subject, styles never seen)",
}  # fmt: skip


def card(scores: dict[str, Any], facts: dict[str, Any], parameters: int) -> str:
    """Write the model's card."""

    def share(right: int, questions: int) -> str:
        return f"{right / questions:.0%} ({right} of {questions})" if questions else ""

    rows = [
        f"| {ASKED[kind]} | {share(found['right'], found['questions'])} | "
        + " | ".join(share(*found[f"with {n}"]) for n in (1, 2, 3))
        + " |"
        for kind, found in scores.items()
    ]
    return "\n".join([
        "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text", "---",
        f"# {NAME}", "",
        f"A very small vision-language model in the format of LLaVA 1.5 ({parameters / 1e6:.2f} M parameters, fp16):",
        "a SigLIP vision tower of 5 layers (64 x 64 pixels, 64 patches), a projector of two layers and a Llama of 3",
        "layers, all of width 128, with a byte-level BPE of 640 tokens. It answers a few kinds of English questions",
        "about emoji-like icons and nothing else. It exists so that what works on large models of this kind (training",
        "adapters under the language model, asking with and without them) can be run and tested anywhere in seconds.",
        "", "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
        f'model = AutoModelForImageTextToText.from_pretrained("assets/models/{NAME}")',
        f'processor = AutoProcessor.from_pretrained("assets/models/{NAME}")',
        'parts = [{"type": "image", "path": "icon.png"}, {"type": "text", "text": "What is it?"}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,',
        '    return_tensors="pt",', ")",
        "made = model.generate(**inputs, max_new_tokens=16)", "```", "",
        "## Scores", "",
        "Share of answers that are exactly the expected words, greedy, on pictures drawn with seeds never used in",
        "training (the subjects and, but for the last line, the styles are those of the training); also by the number",
        "of subjects in the picture. Chance is a half for yes or no, a third for the style, a ninth to a half for the",
        "background (white is half of them): a line near it says that this is not learnt.", "",
        "| question | all | one subject | two | three |", "|---|---|---|---|---|", *rows, "",
        "## Training", "",
        f"{facts['steps']:,} steps of {facts['batch']} pictures, {facts['minutes']} minutes of one CPU core in all:",
        f"first the vision tower alone learnt which of {len(data.BASE_CONCEPTS)} subjects covers each patch (its head",
        f"is not shipped), then everything learnt to answer {facts['turns']} questions per picture. The curve is in",
        "`training.json`. The pictures are renders of emoji art (see `assets/NOTICE`); no picture made by a model and",
        "no pretrained weight was used.", "",
        "`python -m assets.build.vlm` continues the training from its checkpoint, `--export` writes this folder.", "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--naming-for", type=float, default=12)
    parser.add_argument("--decay-for", type=float, default=12)
    parser.add_argument("--at-most", type=float, default=1e9, help="minutes of this call; run again to go on")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--from-shipped", action="store_true", help="without a checkpoint: go on from what is shipped")
    parser.add_argument("--export", action="store_true", help="write the model instead of training it")
    parser.add_argument("--per-kind", type=int, default=200, help="questions of each kind for the scores")
    options = parser.parse_args(arguments)
    if options.export:
        export(Path(assets.__file__).parent / "models" / NAME, options.per_kind)
        return
    done = train(
        options.minutes, options.naming_for, options.decay_for, options.rate, options.at_most, options.from_shipped
    )
    print("complete" if done else "run again to go on")


if __name__ == "__main__":
    main()
