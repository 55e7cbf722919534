"""How often the server's "auto" picks the right adapter, on real sentences that it has not seen.

    python -m benchmarks.choosing            (writes benchmarks/results/choosing.md)

An adapter's training rows are the first sentences of the docstrings of one module of Python's standard library; a
request is such a sentence of the same module that was held out. Requests from modules without an adapter should go to
the base. The server's word index is compared with two ways that read the base model (SmolLM2-135M): the mean of its
input embeddings, and of its hidden states after half of its layers; each with its nearest centroid.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from studio.serving.automatic import Index

RESULTS = Path(__file__).parent / "results"
TOPICS = {
    "email": ("email.message", "email.header", "email.utils", "email.charset", "email.policy", "email.generator"),
    "asyncio": ("asyncio.events", "asyncio.streams", "asyncio.tasks", "asyncio.queues", "asyncio.base_events"),
    "decimals": ("_pydecimal", "fractions", "statistics"),
    "tests": ("unittest.case", "unittest.mock", "unittest.suite", "doctest"),
    "windows": ("tkinter", "tkinter.ttk", "turtle"),
    "archives": ("tarfile", "zipfile", "gzip", "shutil"),
    "dates": ("_pydatetime", "calendar", "zoneinfo._zoneinfo", "datetime"),
    "networks": ("ipaddress", "socket", "http.client", "ftplib", "smtplib", "imaplib"),
}
OUTSIDE = ("xml.dom.minidom", "inspect", "pdb", "typing", "csv", "argparse", "logging", "random", "textwrap", "ast")
"""Modules that no adapter is for."""


def sentences(modules: Sequence[str]) -> list[str]:
    """The first sentences of the docstrings of functions and methods, each once."""
    found: dict[str, None] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        things = [one for _, one in inspect.getmembers(module) if getattr(one, "__module__", "") == module.__name__]
        things += [one for thing in things if inspect.isclass(thing) for one in vars(thing).values()]
        for thing in things:
            told = getattr(thing, "__doc__", None)
            text = " ".join(told.split("\n\n")[0].split()) if isinstance(told, str) else ""
            if 20 <= len(text) <= 300:
                found[text] = None
    return list(found)


def split(seed: int, rows: int, held_out: int) -> tuple[dict[str, list[str]], list[tuple[str, str]], list[str]]:
    """Rows per topic, (topic, request) held out, and requests from outside."""
    order = random.Random(seed)
    learnt, asked = {}, []
    for topic, modules in TOPICS.items():
        texts = sentences(modules)
        order.shuffle(texts)
        learnt[topic] = texts[:rows]
        asked += [(topic, text) for text in texts[rows : rows + held_out]]
    outside = sentences(OUTSIDE)
    order.shuffle(outside)
    return learnt, asked, outside[: len(asked)]


Choose = Callable[[str], tuple[str, float]]


def lexical(learnt: dict[str, list[str]]) -> Choose:
    return Index(learnt).best


def neural(learnt: dict[str, list[str]], embed: Callable[[list[str]], Any]) -> Choose:
    """The nearest centroid by cosine, after the mean over all rows is taken away; confidence = lead over the second."""
    import torch
    import torch.nn.functional as F

    rows = {topic: embed(texts) for topic, texts in learnt.items()}
    middle = torch.cat(list(rows.values())).mean(0)
    centroids = {topic: F.normalize((found - middle).mean(0), dim=0) for topic, found in rows.items()}

    def choose(text: str) -> tuple[str, float]:
        asked = F.normalize(embed([text])[0] - middle, dim=0)
        ranked = sorted(((float(asked @ centre), topic) for topic, centre in centroids.items()), reverse=True)
        return ranked[0][1], ranked[0][0] - ranked[1][0]

    return choose


def embedders(run: bool) -> dict[str, Callable[[list[str]], Any]]:
    """Ways to read the base."""
    import torch

    from pipelines.language.loading import open_model
    from studio.library import smollm2

    base = open_model(smollm2.prepare())
    layer = base.model.config.num_hidden_layers // 2

    def each(texts: list[str], read: Callable[[Any], Any]) -> Any:
        with torch.no_grad():
            return torch.stack([read(base.tokenizer(text, return_tensors="pt")["input_ids"]) for text in texts])

    base.model.model.layers = base.model.model.layers[:layer]
    base.model.config.num_hidden_layers = layer

    def hidden(ids: Any) -> Any:
        return base.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, 1:].mean(0)

    table = base.model.get_input_embeddings()
    still: dict[str, Callable[[list[str]], Any]] = {
        "input embeddings": lambda texts: each(texts, lambda ids: table(ids)[0].mean(0)),
    }
    return still | ({f"hidden states after {layer} layers": lambda texts: each(texts, hidden)} if run else {})


def measure(choose: Choose, asked: list[tuple[str, str]], outside: list[str]) -> dict[str, float]:
    """Accuracy without a threshold; with the one at which as many from outside reach the base as own ones are kept."""
    own = [(topic, *choose(text)) for topic, text in asked]
    other = [choose(text)[1] for text in outside]
    found = {"right": sum(topic == picked for topic, picked, _ in own) / len(own)}
    levels = sorted({confidence for _, _, confidence in own})
    best = min(levels, key=lambda level: abs(
        sum(confidence >= level for _, _, confidence in own) / len(own) - sum(one < level for one in other) / len(other)
    ))  # fmt: skip
    for name, level in (("balanced", best), ("0.5", 0.5)):
        kept = [(topic, picked) for topic, picked, confidence in own if confidence >= level]
        found |= {
            f"{name}: threshold": level,
            f"{name}: own requests that reach their adapter": sum(t == p for t, p in kept) / len(own),
            f"{name}: own requests that reach a wrong one": sum(t != p for t, p in kept) / len(own),
            f"{name}: others that reach the base": sum(one < level for one in other) / len(other),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--without-hidden", action="store_true", help="leave out the way that runs the base")
    asked = parser.parse_args()
    ways: dict[str, Any] = {"words (the server's)": None} | embedders(not asked.without_hidden)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for seed in range(asked.seeds):
        learnt, own, outside = split(seed, asked.rows, asked.held_out)
        for name, embed in ways.items():
            choose = lexical(learnt) if embed is None else neural(learnt, embed)
            found[name].append(measure(choose, own, outside))
            print(seed, name, json.dumps(found[name][-1]), flush=True)
    keys = list(found["words (the server's)"][0])
    command = f"python -m benchmarks.choosing --seeds {asked.seeds} --rows {asked.rows} --held-out {asked.held_out}"
    command += " --without-hidden" if asked.without_hidden else ""
    lines = [
        "# Choosing an adapter by the request", "", f"`{command}`; {len(TOPICS)} adapters, mean of the seeds. The "
        "threshold 0.5 is the server's default and means nothing for ways that read the base.", "",
        "| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|",
        *(f"| {key} | " + " | ".join(f"{mean(one[key] for one in each):.3f}" for each in found.values()) + " |"
          for key in keys),
        "",
    ]  # fmt: skip
    (RESULTS / "choosing.md").write_text("\n".join(lines))
    (RESULTS / "choosing.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
