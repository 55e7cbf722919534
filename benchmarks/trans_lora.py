"""Trans-LoRA (studio transfer) between two toy Llamas with different tokenizers, beside training on other inputs.

Both bases learn letter functions and lists of inputs of one family each ("### Example" and six letters: which letters,
in which order), so they go on with a list as a larger model does with a 5-shot prompt. The task is a function that no
base knows (the next letter, halves swapped) on one narrow family: every second letter of the alphabet, ascending. The
source (width 48, 2 layers) learns it as a LoRA from 200 rows; the bundle keeps five inputs and the discriminator. The
target (width 64, 3 layers) gets it from 200 examples, filtered or not, from 200 random inputs that the source answers,
from the five seeds alone, or (oracle) from the 200 rows themselves; always as many steps. Tested on 200 other inputs of
the family.

    python -m benchmarks.trans_lora             # 3 seeds, about 3 minutes each on one core
    python -m benchmarks.trans_lora --report    # writes the table again from the .json

Writes benchmarks/results/trans_lora.{json,md}. The bars are those of ../shared/specs/trans-lora.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters import files
from adapters.generation.trans_lora import HEAD
from adapters.progress import Silent

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH, ROWS, TESTED = 6, 200, 200
SOURCE, TARGET = {"hidden": 48, "layers": 2}, {"hidden": 64, "layers": 3}
FAMILIES = {"even": LETTERS[::2], "odd": LETTERS[1::2], "first": LETTERS[:13], "second": LETTERS[13:], "all": LETTERS}
ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "ascending": sorted, "descending": lambda letters: sorted(letters, reverse=True), "any": list,
}  # fmt: skip
FAITHFUL = 0.4
"""Share of a list's inputs that are of its family; the others are of any, as a small model follows examples loosely."""
QUESTION = "?{input}\n"
STEPS, BATCH, RATE = 400, 32, 1e-2
STUDENT: dict[str, Any] = {
    "rank": 8, "alpha": 16, "learning_rate": RATE, "seed": 0, "max_length": 64, "batch_size": BATCH,
}  # fmt: skip


def following(text: str) -> str:
    """Every letter's next one, around the end."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in text)


def swapped(text: str) -> str:
    return text[len(text) // 2 :] + text[: len(text) // 2]


FUNCTIONS: Sequence[Callable[[str], str]] = (
    lambda x: x, lambda x: x[::-1], following, swapped,
)  # fmt: skip
"""What the bases know, each behind a digit of its own."""


def task(text: str) -> str:
    """The function that they do not know."""
    return swapped(following(text))


def of_family(r: random.Random, family: str, order: str) -> str:
    """An input of six different letters."""
    return "".join(ORDERS[order](r.sample(FAMILIES[family], LENGTH)))


def in_task(text: str) -> bool:
    """Whether an input is of the task's family."""
    known = set(text) <= set(FAMILIES["even"])
    return len(text) == LENGTH and known and all(one < two for one, two in itertools.pairwise(text))


# ------------------------------------------------------------------------------------------------ bases


def tokenizer(order: int) -> PreTrainedTokenizerFast:
    """A token per letter and digit, and one for the line above examples; ``order`` numbers them differently."""
    words = [*LETTERS, *"0123456789", " ", "\n", "?", HEAD]
    random.Random(order).shuffle(words)
    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{HEAD}|[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def function_row(r: random.Random) -> str:
    """A row of a function that the bases know."""
    number, text = r.randrange(len(FUNCTIONS)), of_family(r, "all", "any")
    return f"{number}{text} {FUNCTIONS[number](text)}"


def listed(r: random.Random, count: int = 6) -> str:
    """A list of inputs, mostly of one family."""
    families = [(family, order) for family in FAMILIES for order in ORDERS]
    mine = r.choice(families)
    shown = [mine if r.random() < FAITHFUL else r.choice(families) for _ in range(count)]
    return "\n\n".join(f"{HEAD}\n{of_family(r, *each)}" for each in shown)


def base(folder: Path, hidden: int, layers: int, order: int, steps: int = 2500) -> Path:
    """Train a base and write it as a transformers directory, unless it is there; returns it."""
    if (folder / "config.json").is_file():
        return folder
    spelling = tokenizer(order)
    torch.manual_seed(order)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(spelling), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False,
    ))  # fmt: skip
    r, optimizer = random.Random(order), torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for make, count in ((function_row, 64), (listed, 8)):
            given = spelling([make(r) + spelling.eos_token for _ in range(count)], padding=True, return_tensors="pt")
            labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
            model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    spelling.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ one seed


def rows_file(place: Path, inputs: Sequence[str], answers: Sequence[str] | None = None) -> Path:
    """Rows of inputs with the right answers, or with those given."""
    pairs = zip(inputs, answers or map(task, inputs), strict=True)
    return files.write_text(place, "".join(json.dumps({"prompt": x, "completion": y}) + "\n" for x, y in pairs))


def adapter(place: Path, on: Path, data: Path, steps: int = STEPS) -> Path:
    """Train a LoRA on rows; returns its folder."""
    from studio.training.schemas.language import TrainLanguageConfig
    from studio.training.tasks.language import run

    config = TrainLanguageConfig.parse(
        {**STUDENT, "base": str(on), "data": str(data), "name": "it", "steps": steps, "device": "cpu", "save_every": 0}
    )
    return Path(run(config, place, Silent())["adapter"])


def answers(on: Path, lora: Path | None, inputs: Sequence[str]) -> list[str]:
    """Greedy answers of a base, with or without a LoRA."""
    from pipelines.language.adapters import AdaptedModel
    from pipelines.language.batches import answers as batched
    from pipelines.language.loading import open_model

    opened = open_model(on)
    adapted = AdaptedModel(opened.model)
    if lora is not None:
        adapted.add("it", lora)
    with adapted.active({"it": 1.0} if lora is not None else {}):
        talks = [[{"role": "user", "content": text}] for text in inputs]
        return [one.text for one in batched(opened.model, opened.tokenizer, talks, LENGTH + 2, 64)]


def right(on: Path, lora: Path | None, inputs: Sequence[str]) -> float:
    """Share of the inputs answered rightly."""
    made = answers(on, lora, inputs)
    return sum(one == task(text) for one, text in zip(made, inputs, strict=True)) / len(inputs)


def one(seed: int, bases: tuple[Path, Path], place: Path) -> dict[str, Any]:
    """Everything of one seed."""
    from studio.transfer import job, preparation
    from studio.transfer.schema import PrepareTransferConfig, TransferConfig

    source, target = bases
    started, r = time.perf_counter(), random.Random(100 + seed)
    family: list[str] = []
    while len(family) < ROWS + TESTED:
        text = of_family(r, "even", "ascending")
        family += [] if text in family else [text]
    real, tested = family[:ROWS], family[ROWS:]
    random_inputs = [of_family(r, "all", "any") for _ in range(4 * ROWS)]
    data, test = rows_file(place / "rows.jsonl", real), rows_file(place / "test.jsonl", tested)
    teacher = adapter(place / "source", source, data)
    prepared = preparation.prepare(PrepareTransferConfig.parse({
        "adapter": str(teacher), "base": str(source), "data": str(data), "question": QUESTION, "yes": "y", "no": "n",
        "rank": 8, "learning_rate": 1e-3, "epochs": 40, "input_tokens": 12, "batch": 32, "seed": seed, "device": "cpu",
    }), place / "prepare", Silent())  # fmt: skip
    common = {
        "bundle": prepared["bundle"], "base": str(source), "to": str(target), "count": ROWS, "input_tokens": 12,
        "answer_tokens": LENGTH + 2, "batch": 32, "rank": 8, "learning_rate": RATE, "validation_split": 0.0,
        "training": {"steps": STEPS, "save_every": 0, "batch_size": BATCH}, "seed": seed, "device": "cpu",
        "test_data": str(test),
    }  # fmt: skip
    found: dict[str, Any] = {"seed": seed, "discriminator": prepared["discriminator"], "student": {}, "made": {}}
    for name, filtered in (("filtered", True), ("unfiltered", False)):
        made = job.run(TransferConfig.parse({**common, "filter": filtered}), place / name, Silent())
        examples = [json.loads(one) for one in Path(made["examples"]).read_text().splitlines()]
        found["student"][name] = made["test"]["transferred"]
        found["made"][name] = {
            "acceptance": made["acceptance"], "outcomes": made["outcomes"],
            "purity": statistics.fmean(in_task(one["prompt"]) for one in examples),
            "right": statistics.fmean(one["completion"] == task(one["prompt"]) for one in examples),
        }  # fmt: skip
        found |= {"source LoRA": made["test"]["source"], "target base": made["test"]["target base"]}
    written = [one["text"] for batch in Path(made["examples"]).with_name("written.jsonl").read_text().splitlines()[1:]
               for one in json.loads(batch)]  # fmt: skip
    found["written in family"] = statistics.fmean(map(in_task, written))
    answered = [(text, said) for text, said in
                zip(random_inputs, answers(source, teacher, random_inputs), strict=True) if said][:ROWS]  # fmt: skip
    uniform, said = [text for text, _ in answered], [answer for _, answer in answered]
    found["made"]["uniform"] = {"purity": 0.0, "right": statistics.fmean(
        answer == task(text) for answer, text in zip(said, uniform, strict=True))}  # fmt: skip
    seeds = [json.loads(one)["input"] for one in (Path(prepared["bundle"]) / "seeds.jsonl").read_text().splitlines()]
    for name, inputs, given in (("uniform", uniform, said), ("seeds", seeds, answers(source, teacher, seeds)),
                                ("oracle", real, None)):  # fmt: skip
        learnt = adapter(place / name, target, rows_file(place / f"{name}.jsonl", inputs, given))
        found["student"][name] = right(target, learnt, tested)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


# ------------------------------------------------------------------------------------------------ report


def bars(seeds: Sequence[dict[str, Any]]) -> dict[str, tuple[bool, str]]:
    """Each bar of the specification: whether it is met, and the numbers."""

    def mean(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.fmean(of(one) for one in seeds)

    student = {name: mean(lambda one, name=name: one["student"][name]) for name in seeds[0]["student"]}
    source, alone = mean(lambda one: one["source LoRA"]), mean(lambda one: one["target base"])
    kept, drawn = mean(lambda one: one["made"]["filtered"]["purity"]), mean(lambda one: one["written in family"])
    labels = mean(lambda one: one["made"]["filtered"]["right"])
    accepted = mean(lambda one: one["discriminator"]["accepted"] / one["discriminator"]["real"])
    f, u = student["filtered"], student["unfiltered"]
    return {
        "transferred >= source LoRA - 0.02": (f >= source - 0.02, f"{f:.3f}, {source:.3f}"),
        "transferred >= target base + 0.3": (f >= alone + 0.3, f"{f:.3f}, {alone:.3f}"),
        "filtered - unfiltered >= 0.02": (f - u >= 0.02, f"{f:.3f}, {u:.3f}"),
        "unfiltered > uniform": (u > student["uniform"], f"{u:.3f}, {student['uniform']:.3f}"),
        "real inputs accepted >= 0.8": (accepted >= 0.8, f"{accepted:.3f}"),
        "purity of kept >= 2.5 x that of written": (kept >= 2.5 * drawn, f"{kept:.3f}, {drawn:.3f}"),
        "teacher right on kept >= 0.9": (labels >= 0.9, f"{labels:.3f}"),
    }


def report(found: dict[str, Any]) -> str:
    """The table and the bars as markdown."""
    seeds = found["seeds"]
    names = list(seeds[0]["student"])
    columns = ["source LoRA", "target base", *names]

    def cells(one: dict[str, Any]) -> list[str]:
        return [f"{value:.3f}" for value in (one["source LoRA"], one["target base"], *one["student"].values())]

    lines = [
        "# Trans-LoRA between toy bases", "",
        f"`python -m benchmarks.trans_lora`, {found['machine']}. Share of {TESTED} test inputs answered rightly; the "
        f"five right columns are target LoRAs after {STEPS} steps.", "",
        f"| seed | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}",
        *(f"| {one['seed']} | {' | '.join(cells(one))} |" for one in seeds), "",
        "| seed | inputs | in the task's family | teacher right | acceptance |", "|---|---|---|---|---|",
        *(f"| {one['seed']} | {name} | {made['purity']:.3f} | {made['right']:.3f} | "
          f"{made.get('acceptance', 1.0):.3f} |" for one in seeds for name, made in one["made"].items()), "",
        "| seed | real inputs accepted | inputs of the source rejected |", "|---|---|---|",
        *(f"| {one['seed']} | {one['discriminator']['accepted']:.0f} of {one['discriminator']['real']:.0f} | "
          f"{one['discriminator']['rejected']:.0f} of {one['discriminator']['written']:.0f} |" for one in seeds), "",
        f"Bars (mean of {len(seeds)} seeds):", "",
        *(f"- {'met' if met else '**not met**'}: {name} ({told})" for name, (met, told) in bars(seeds).items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table again")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--bases", type=Path, help="folder in which the trained bases are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    place = asked.out / "trans_lora.json"
    if not asked.report:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ADAPTER_STUDIO_HOME"] = str(Path(folder) / "home")
            kept = asked.bases or Path(folder)
            bases = (base(kept / "source", order=1, **SOURCE), base(kept / "target", order=2, **TARGET))
            found = []
            for seed in asked.seeds:
                found.append(one(seed, bases, Path(folder) / str(seed)))
                print(json.dumps(found[-1]), flush=True)
        machine = f"{platform.machine()}, torch {torch.__version__}, one thread"
        files.write_text(place, json.dumps({"machine": machine, "seeds": found}, indent=1) + "\n")
    files.write_text(asked.out / "trans_lora.md", report(json.loads(place.read_text())))
    print((asked.out / "trans_lora.md").read_text())


if __name__ == "__main__":
    main()
