"""What training several adapters at once saves: bytes per adapter, and time per step over the tokens of a batch.

The trainings are the studio's own (`studio train language`), alone and together. Bytes are counted, not read from the
system: the peak of the tensors that autograd keeps (each storage once), the parameters (each once, in fp32), and the
optimisers' states. With a base of W bytes, and a bytes of activations, adapter and optimiser for each of M adapters,
separate trainings take W + a each and a training together W / M + a: the table's `predicted` is that, from the separate
run. Time is the CPU time of the process between two steps (optimiser, records and everything else included), the least
of many, one thread, separate and together taking turns.

    python -m benchmarks.packed_training             # about 10 minutes of one CPU core
    python -m benchmarks.packed_training --report    # writes the table again from the .json

Writes benchmarks/results/packed_training.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.plugin import Handles, Plugin
from adapters.progress import Silent
from studio import silence
from studio.training.drivers import packed
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
STEPS, ROUNDS = 10, 3
SHORT = {"SmolLM2-135M": (6, 2)}
"""Steps and rounds of timing; of the real model fewer."""
SIZES = {"18 MiB": (256, 688), "72 MiB": (512, 1376)}
"""Width and inner width of the six layers of a random Llama, by the size of its base."""
MEMORY: tuple[tuple[str, int, int], ...] = (
    ("18 MiB", 2, 64), ("18 MiB", 2, 128), ("72 MiB", 2, 64), ("72 MiB", 2, 128), ("72 MiB", 4, 128),
    ("SmolLM2-135M", 2, 128), ("SmolLM2-135M", 4, 128),
)  # fmt: skip
TIMES: tuple[tuple[str, int, int], ...] = (
    ("18 MiB", 2, 128), ("18 MiB", 2, 64), ("18 MiB", 4, 32), ("18 MiB", 4, 8), ("18 MiB", 8, 4),
    ("72 MiB", 4, 32), ("SmolLM2-135M", 2, 128), ("SmolLM2-135M", 4, 32), ("SmolLM2-135M", 4, 8),
)  # fmt: skip
"""(base, adapters, tokens of each in a batch)."""


def llama(folder: Path, hidden: int, inner: int) -> str:
    """A random Llama of six layers that spells bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(["<pad>", "</s>", *letters])}, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=6,
        num_attention_heads=8, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Sight(Plugin):
    """Sees the parameters and the optimiser of a run, and the process's CPU time after every step."""

    name = "sight"

    def __init__(self, kept: Kept | None = None) -> None:
        self.moments: list[float] = []
        self.kept = kept

    def after_inject(self, handles: Handles) -> None:
        self.handles = handles
        if self.kept is not None:
            self.kept.besides |= {tensor.untyped_storage().data_ptr() for tensor in self.parameters}

    def after_step(self, step: int) -> None:
        self.moments.append(time.process_time())

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for model in self.handles.models.values() for tensor in model.parameters()]

    @property
    def states(self) -> list[Tensor]:
        assert self.handles.optimizer is not None
        return [value for state in self.handles.optimizer.state.values() for value in state.values()
                if torch.is_tensor(value)]  # fmt: skip


class Kept:
    """Counts what autograd keeps, each storage once, in all threads that enter :meth:`counting`.

    Attributes:
        peak: bytes of the largest moment.
        besides: storages of parameters, which are counted elsewhere.
    """

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = 0
        self.besides: set[int] = set()

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor):
            yield

    def add(self, place: int, size: int) -> None:
        if place not in self.live:
            self.live[place] = [0, 0 if place in self.besides else size]
            self.now += self.live[place][1]
            self.peak = max(self.peak, self.now)
        self.live[place][0] += 1

    def drop(self, place: int) -> None:
        self.live[place][0] -= 1
        if not self.live[place][0]:
            self.now -= self.live.pop(place)[1]


class _Saved:
    """A tensor that autograd keeps; it counts until it is freed."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.tensor, self.kept = tensor, kept
        self.place = tensor.untyped_storage().data_ptr()
        kept.add(self.place, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.kept.drop(self.place)


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of their storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def configs(base: str, data: Path, count: int, tokens: int, steps: int) -> list[TrainLanguageConfig]:
    """``count`` trainings with batches of exactly ``tokens`` tokens: two rows, or one if they are few."""
    rows = 2 if tokens >= 64 else 1
    return [
        TrainLanguageConfig.parse({
            "base": base, "data": str(data), "rank": 8, "steps": steps, "batch_size": rows, "device": "cpu",
            "max_length": tokens // rows, "loss_on": "all", "seed": seed, "checkpoint_every": 0, "save_every": 0,
        })
        for seed in range(count)
    ]  # fmt: skip


def separate(made: list[TrainLanguageConfig], kept: Kept | None = None) -> list[Sight]:
    """Train one after another."""
    return [_one(config, None, kept) for config in made]


def together(made: list[TrainLanguageConfig], kept: Kept | None = None) -> list[Sight]:
    """Train as one."""
    works = [lambda member, config=config: _one(config, member, kept) for config in made]
    if kept is None:
        found = packed.run(works)
    else:
        with kept.counting():  # of this thread, in which the shared passes run
            found = packed.run(works)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def _one(config: TrainLanguageConfig, member: packed.Member | None, kept: Kept | None) -> Sight:
    sight = Sight(kept)
    with tempfile.TemporaryDirectory() as folder:
        if kept is None:
            run(config, Path(folder), Silent(), plugins=[sight], member=member)
        else:
            with kept.counting():
                run(config, Path(folder), Silent(), plugins=[sight], member=member)
    return sight


def memory(base: str, data: Path, count: int, tokens: int) -> dict[str, float]:
    """MiB of one separate training, and of ``count`` together per adapter."""
    made = configs(base, data, count, tokens, steps=2)
    found: dict[str, float] = {}
    for name, train, chosen in (("separate", separate, made[:1]), ("together", together, made)):
        kept = Kept()
        sights = train(chosen, kept)
        parameters = bytes_of([tensor for sight in sights for tensor in sight.parameters])
        states = bytes_of([tensor for sight in sights for tensor in sight.states])
        found[name] = (parameters + states + kept.peak) / len(sights) / MIB
        if name == "separate":
            frozen = [tensor for tensor in sights[0].parameters if not tensor.requires_grad]
            found["base"] = bytes_of(frozen) / MIB
    return found


def seconds(
    base: str, data: Path, count: int, tokens: int, steps: int = STEPS, rounds: int = ROUNDS
) -> dict[str, float]:
    """Least CPU seconds of one step of every adapter, separate and together."""
    made = configs(base, data, count, tokens, steps)
    found: dict[str, list[float]] = {"separate": [], "together": []}
    for number in range(rounds):
        for name in ("separate", "together") if number % 2 == 0 else ("together", "separate"):
            if name == "separate":
                each = [min(_gaps(sight.moments)) for sight in separate(made)]
                found[name].append(sum(each))
            else:
                found[name].append(min(_gaps(together(made)[0].moments)))
    return {name: min(values) for name, values in found.items()}


def _gaps(moments: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments[1:])]


def measure() -> dict[str, Any]:
    from studio import library

    began = time.process_time()
    silence.library_warnings()
    silence.loading_bars()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {"memory": [], "time": []}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        text = " ".join(f"The {n}th of many lines is as long as the others." for n in range(400))
        data.write_text("".join(json.dumps({"text": text[start:]}) + "\n" for start in range(0, 400, 40)))
        bases = {name: llama(Path(place) / name.split()[0], *size) for name, size in SIZES.items()}
        bases["SmolLM2-135M"] = str(library.resolve_language("smollm2"))
        for name, count, tokens in MEMORY:
            row = {"base_name": name, "adapters": count, "tokens": tokens}
            rows["memory"].append(row | memory(bases[name], data, count, tokens))
            print(rows["memory"][-1], flush=True)
        for name, count, tokens in TIMES:
            row = {"base_name": name, "adapters": count, "tokens": tokens}
            rows["time"].append(row | seconds(bases[name], data, count, tokens, *SHORT.get(name, ())))
            print(rows["time"][-1], flush=True)
    return {**rows, "torch": torch.__version__, "machine": platform.machine(),
            "cpu_seconds": round(time.process_time() - began, 1)}  # fmt: skip


def report(found: dict[str, Any]) -> str:
    lines = [
        "# Training several adapters at once",
        "",
        "    python -m benchmarks.packed_training",
        "",
        f"LoRAs of rank 8 on every linear layer, AdamW, fp32, one thread, torch {found['torch']}, {found['machine']}.",
        "The first two bases are random Llamas of six layers. Bytes are counted: what autograd keeps at its peak,",
        "parameters, optimisers. `predicted` is (W / M + a) / (W + a), W the base and a the rest of a separate run.",
        "",
        "| base | adapters | tokens of each | W (MiB) | a (MiB) | separate (MiB) | together, each (MiB) | ratio "
        "| predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["memory"]:
        rest = row["separate"] - row["base"]
        predicted = (row["base"] / row["adapters"] + rest) / row["separate"]
        lines.append(
            f"| {row['base_name']} | {row['adapters']} | {row['tokens']} | {row['base']:.1f} | {rest:.1f} | "
            f"{row['separate']:.1f} | {row['together']:.1f} | **{row['together'] / row['separate']:.2f}** | "
            f"{predicted:.2f} |"
        )
    lines += [
        "",
        "Least CPU time of one whole step of every adapter (passes, optimisers, records):",
        "",
        "| base | adapters | tokens of each | one after another (ms) | together (ms) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["time"]:
        lines.append(
            f"| {row['base_name']} | {row['adapters']} | {row['tokens']} | {1000 * row['separate']:.0f} | "
            f"{1000 * row['together']:.0f} | **{row['together'] / row['separate']:.2f}** |"
        )
    return "\n".join([*lines, "", f"Took {found['cpu_seconds'] / 60:.0f} minutes of CPU time.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--report", action="store_true", help="write the table again from the .json")
    chosen = parser.parse_args()
    file = RESULTS / "packed_training.json"
    if not chosen.report:
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    file.with_suffix(".md").write_text(report(json.loads(file.read_text())))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
