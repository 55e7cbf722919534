"""Federated training measured: accuracy, bytes and bias of every server rule; traffic by count; privacy.

    python -m assets.build.emoji_domains --out FOLDER --bases      # once: data and bases, npm needed
    python -m benchmarks.federated methods --data FOLDER --out RUNS --bases emoji-vit emoji-mixer --seeds 0 1 2
    python -m benchmarks.federated privacy --data FOLDER --out RUNS
    python -m benchmarks.federated traffic
    FLOWER/bin/python -m benchmarks.federated deployment --data FOLDER --out RUNS     # where Flower is installed
    python -m benchmarks.federated report --out RUNS               # writes benchmarks/results/federated.md

Each client has one style of emoji (Noto, Twemoji, Fluent flat, Fluent high contrast); test emoji are the same 30 % of
code points for all. With ``--data assets/federated`` the shipped sample (three styles, 84 emoji each) and the embedded
bases are used, which takes a tenth of the time. Every run is one file in RUNS, so an interrupted program goes on where
it was, and more seeds or rounds add to what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapters import files
from adapters.federated.facts import facts, rules, sent

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {}, "ffa-lora": {}, "flora": {}, "flexlora": {}, "fedex-lora": {}, "lora-fair": {},
    "lora-fair cosine": {"method": "lora-fair", "correction": "cosine"}, "fed-sb": {},
    "fed-sb r32": {"method": "fed-sb", "rank": 32},
}  # fmt: skip
"""Name in the table -> what differs from its own defaults (rank 8)."""

PRIVATE = ("fedit", "ffa-lora", "fed-sb")
EPSILONS = (0.0, 6.0, 3.0, 1.0)
"""0 stands for training without privacy, at the same steps and batches."""


def federation(data: Path, base: str, name: str, seed: int, rounds: int, epochs: int, **more: Any) -> dict[str, Any]:
    """The configuration of one run."""
    changes = {"method": name, **METHODS.get(name, {})}
    rank = int(changes.pop("rank", 8))
    return {
        "name": "shared", "rounds": rounds, "train": "classifier", "data": str(data / "rows.jsonl"),
        "partition": "column", "by": "domain", "test_by": "code", "test_share": 0.3, "evaluate_every": 0,
        "seed": seed,
        "training": {
            "base": place(data, base), "rank": rank, "epochs": epochs, "batch_size": 32, "learning_rate": 2e-3,
            "lr_schedule": "constant", "device": "cpu",
        },
        **changes, **more,
    }  # fmt: skip


def place(data: Path, base: str) -> str:
    """The base beside the data, else an embedded one's name."""
    return str(data / base) if (data / base).is_dir() else base


def run(values: dict[str, Any], out: Path, label: str) -> dict[str, Any]:
    """One federation, or what was kept of it."""
    import torch

    from studio import silence
    from studio.federation import engine
    from studio.federation.schema import FederateConfig

    file = out / f"{label.replace(' ', '-')}.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    torch.set_num_threads(1)
    silence.library_warnings()
    silence.loading_bars()
    folder, began, processor = out / "running" / label.replace(" ", "-"), time.time(), time.process_time()
    result = engine.run(FederateConfig.parse(values), folder, resume=True)
    history = engine.read_history(folder)
    found = {
        "label": label, "config": values, "measures": result["measures"], "bytes": result["bytes"],
        "epsilon": result.get("epsilon"), "rounds": history[1:], "seconds": time.time() - began,
        "processor_seconds": time.process_time() - processor,
    }  # fmt: skip
    files.write_text(file, json.dumps(found))
    print(f"{label}: {result['measures']}, {found['processor_seconds']:.0f} CPU-s", flush=True)
    return found


def untouched(data: Path, out: Path, base: str) -> float:
    """Mean accuracy of the base itself on the clients' test emoji."""
    import torch

    from pipelines.vision.labels import known_labels
    from pipelines.vision.loading import open_classifier
    from studio.datasets.labelled_pictures import labelled
    from studio.datasets.seeds import rng
    from studio.datasets.texts import scan
    from studio.federation.partition import held_out_groups
    from studio.training.labelled_rows import source_of

    file = out / f"untouched-{base}.json"
    if not file.is_file():
        scanned = scan(str(data / "rows.jsonl"))
        held = held_out_groups([row.values["code"] for row in scanned.rows], 0.3, rng(0, "test"))
        scanned.rows = [row for row in scanned.rows if row.values["code"] in held]
        source = source_of(place(data, base))
        opened = open_classifier(source, known_labels(source), "fp32")
        rows = labelled(scanned)
        pixels = torch.stack([opened.pixels(row.open()) for row in rows])
        with torch.no_grad():
            guesses = opened.model.eval()(pixel_values=pixels).logits.argmax(-1).tolist()
        right: dict[str, list[bool]] = {}
        for row, guess in zip(rows, guesses, strict=True):
            right.setdefault(row.path.stem, []).append(opened.labels[guess] == row.label)
        files.write_text(file, json.dumps({domain: sum(one) / len(one) for domain, one in right.items()}))
    return statistics.mean(json.loads(file.read_text(encoding="utf-8")).values())


def methods(given: argparse.Namespace) -> None:
    """Every rule on every base and seed."""
    for seed in given.seeds:
        for base in given.bases:
            untouched(given.data, given.out, base)
            for name in given.names or METHODS:
                values = federation(given.data, base, name, seed, given.rounds, given.epochs)
                run(values, given.out, f"methods {base} {name} seed {seed} rounds {given.rounds} epochs {given.epochs}")


def privacy(given: argparse.Namespace) -> None:
    """FedIT, FFA-LoRA and Fed-SB under sample-level privacy."""
    public = public_rows(given.data, given.out)
    for seed in given.seeds:
        for epsilon in EPSILONS:
            for name in PRIVATE:
                more: dict[str, Any] = {}
                if name == "fed-sb":
                    more = {"public_data": str(public), "public_calibration": True}
                if epsilon:
                    more |= {"privacy": "sample", "target_epsilon": epsilon, "delta": 1e-4}
                values = federation(given.data, given.bases[0], name, seed, given.rounds, 1, **more)
                values["training"] |= {"batch_size": 64, "steps": 15, "max_grad_norm": 0.0, "learning_rate": given.rate}
                del values["training"]["epochs"]
                run(values, given.out, f"privacy {name} epsilon {epsilon:g} seed {seed} rounds {given.rounds}")


def public_rows(data: Path, out: Path) -> Path:
    """Rows of the style that the base has learnt: public, and nobody's."""
    file = out / "public.jsonl"
    lines = [json.loads(line) for line in (data / "bases.jsonl").read_text(encoding="utf-8").splitlines()]
    made = [json.dumps({**row, "image": str((data / row["image"]).resolve())}) for row in lines]
    return files.write_text(file, "\n".join(made) + "\n")


# ------------------------------------------------------------------------------------------------ traffic by count

Shapes = list[tuple[int, int]]


def decoder(hidden: int, inner: int, values: int, blocks: int) -> Shapes:
    """(out, in) of the seven linear layers of every block of a Llama-like model; ``values`` = width of k and v."""
    attention = [(hidden, hidden), (values, hidden), (values, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)] * blocks


MODELS: dict[str, Shapes] = {
    "Mistral-7B": decoder(4096, 14336, 1024, 32),
    "Gemma-2 9B": [(4096, 3584), (2048, 3584), (2048, 3584), (3584, 4096), (14336, 3584), (14336, 3584),
                   (3584, 14336)] * 42,
    "Llama-3.2 3B": decoder(3072, 8192, 1024, 28),
    "tiny ViT (benchmark)": ([(64, 64)] * 4 + [(128, 64), (64, 128)]) * 4,
}  # fmt: skip
"""Published sizes."""


def counted(model: str, method: str, rank: int, clients: int) -> tuple[int, int]:
    """Numbers per round and client, (up, down), of the adapter alone."""
    known = {rule.name: facts(rule) for rule in rules()}
    each = [sent(known[method], out, inputs, rank, clients) for out, inputs in MODELS[model]]
    return sum(up for up, _ in each), sum(down for _, down in each)


TRAFFIC = (
    ("Mistral-7B", 25, (("fed-sb", 200), ("ffa-lora", 32), ("fedit", 32), ("flora", 32), ("fedex-lora", 32))),
    ("Gemma-2 9B", 25, (("fed-sb", 200), ("ffa-lora", 32), ("fedit", 32), ("fedex-lora", 32))),
    ("Llama-3.2 3B", 5, (("fed-sb", 200), ("ffa-lora", 32), ("fedit", 32), ("fedex-lora", 32))),
    ("tiny ViT (benchmark)", 4, (("fed-sb", 8), ("fed-sb", 32), ("ffa-lora", 8), ("fedit", 8), ("fedex-lora", 8))),
)
"""Model, clients, and methods with their ranks, as in Fed-SB's tables (and ours)."""


def traffic_lines() -> list[str]:
    """The table of counts."""
    lines = ["| model, clients | method, rank | numbers up | numbers down | down over Fed-SB's |", "|---" * 5 + "|"]
    for model, clients, chosen in TRAFFIC:
        smallest = counted(model, "fed-sb", chosen[0][1], clients)[1]
        for method, rank in chosen:
            up, down = counted(model, method, rank, clients)
            lines.append(f"| {model}, {clients} | {method} {rank} | {up:,} | {down:,} | {down / smallest:.2f} |")
    return lines


# ------------------------------------------------------------------------------------------------ deployment


def deployment(given: argparse.Namespace) -> None:
    """A server and three clients as processes with TLS and keys; one is killed in round 2 and started again."""
    import os
    import signal
    import subprocess
    import sys

    import yaml

    from studio.federation.flower import certificates
    from studio.federation.history import read_history

    folder, port = (given.out / "deployment").resolve(), 19192
    names = ("noto", "twemoji", "fluent-emoji-flat")
    rows = [json.loads(line) for line in (given.data / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    clients = []
    for name in names:
        mine = [{**row, "image": str((given.data / row["image"]).resolve())} for row in rows if row["domain"] == name]
        text = "".join(f"{json.dumps(row)}\n" for row in mine[: given.limit])
        clients.append({"name": name, "data": str(files.write_text(folder / f"{name}.jsonl", text))})
    values = federation(given.data, given.bases[0], "fedex-lora", 0, 3, 1)
    values = {key: value for key, value in values.items() if key not in ("partition", "by", "test_by", "test_share")}
    values |= {"clients": clients, "data": ""}
    values["training"]["base"] = str((given.data / given.bases[0]).resolve())
    config = files.write_text(folder / "federation.yaml", yaml.safe_dump(values))
    certificates.make(folder / "secrets", ["127.0.0.1"], names)
    events: list[str] = []
    began = time.time()

    def note(what: str) -> None:
        events.append(f"{time.time() - began:.0f} s: {what}")
        print(events[-1], flush=True)

    def studio(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "studio", "federate", *words, "--certificates", str(folder / "secrets")],
            stdout=subprocess.DEVNULL, stderr=(folder / "errors.log").open("ab"),
        )  # fmt: skip

    def client(name: str, own: int) -> subprocess.Popen[bytes]:
        return studio("client", name, str(config), "--folder", str(folder / name), "--server", f"127.0.0.1:{port}",
                      "--port", str(own))  # fmt: skip

    def rounds() -> int:
        return len(read_history(folder / "run")) - 1

    server = studio("server", str(config), "--folder", str(folder / "run"), "--host", "127.0.0.1", "--port", str(port),
                    "--patience", "900")  # fmt: skip
    while not (folder / "run" / "flower" / "commands.log").is_file() and server.poll() is None:
        time.sleep(1)  # until it listens and registers keys
    time.sleep(20)
    there = {name: client(name, port + 1 + number) for number, name in enumerate(names)}
    try:
        while rounds() < 1 and server.poll() is None:
            time.sleep(1)
        if rounds() < 1:
            raise SystemExit(f"The server ended early: see {folder}")
        note("round 1 is done")
        time.sleep(5)
        lost = there[names[2]]
        for node in subprocess.run(["pgrep", "-P", str(lost.pid)], capture_output=True, text=True).stdout.split():
            os.killpg(int(node), signal.SIGKILL)
        lost.kill()
        lost.wait()
        note(f"{names[2]} is killed with SIGKILL, with its processes, in round 2")
        time.sleep(10)
        there[names[2]] = client(names[2], port + 9)
        note(f"{names[2]} is started again")
        code = server.wait()
        note(f"the server ended with {code}")
    finally:
        for process in (*there.values(), server):
            process.terminate()
        for process in (*there.values(), server):
            process.wait(60)
    result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
    about = f"{given.bases[0]}, {given.limit} pictures for each client, one epoch a round."
    history = read_history(folder / "run")
    found = {"about": about, "events": events, "result": result, "rounds": history, "clients": list(names)}
    files.write_text(given.out / "deployment.json", json.dumps(found))


def deployment_lines(out: Path) -> list[str]:
    """What happened in the deployment."""
    file = out / "deployment.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [*([found["about"], ""] if "about" in found else []), *(f"- {event}" for event in found["events"])]
    lines += ["", "| round | answered | left out | up (bytes) | down (bytes) | seconds |", "|---" * 6 + "|"]
    for one in found["rounds"][1:]:
        out_of = "; ".join(f"{name}: {why}" for name, why in one["failed"].items()) or "-"
        lines.append(
            f"| {one['number']} | {', '.join(one['clients'])} | {out_of} | {one['up']:,} | {one['down']:,} | "
            f"{one['seconds']:.0f} |"
        )
    return lines


# ------------------------------------------------------------------------------------------------ report


def kept(out: Path, start: str) -> list[dict[str, Any]]:
    """The runs whose label begins with ``start``."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob(f"{start}-*.json"))]
    return [one for one in found if one["label"].startswith(start)]


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Mean, with the standard deviation of several."""
    mean = statistics.mean(values) * scale
    return f"{mean:.1f} ± {statistics.stdev(values) * scale:.1f}" if len(values) > 1 else f"{mean:.1f}"


def method_lines(out: Path, base: str) -> list[str]:
    """The table of rules on one base."""
    runs = [one for one in kept(out, "methods") if f" {base} " in one["label"]]
    if not runs:
        return []
    lines = ["| method | rank | seeds | mean accuracy (%) | up per client and round (kB) | once (kB) | bias, round 1 |"
             " bias, last | CPU-s |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in METHODS:
        mine = [one for one in runs if one["label"].startswith(f"methods {base} {name} seed ")]
        if not mine:
            continue
        clients = len(mine[0]["rounds"][0]["clients"])
        each = mine[0]["bytes"]["up"] / len(mine[0]["rounds"]) / clients / 1000
        biases = [[one["rounds"][place].get("bias") for one in mine] for place in (0, -1)]
        before = [_before(one, 0) for one in mine]
        first = _number(biases[0]) + (f" (before {_number(before)})" if before[0] is not None else "")
        lines.append(
            f"| {name} | {mine[0]['config']['training']['rank']} | {len(mine)} | "
            f"{spread([one['measures']['accuracy'] for one in mine], 100)} | {each:.1f} | "
            f"{mine[0]['bytes']['once'] / 1000:.0f} | {first} | {_number(biases[1])} | "
            f"{statistics.mean(one['processor_seconds'] for one in mine):.0f} |"
        )
    base_only = json.loads((out / f"untouched-{base}.json").read_text(encoding="utf-8")).values()
    lines.append(f"| untouched base | - | - | {100 * statistics.mean(base_only):.1f} | - | - | - | - | - |")
    return lines


def _before(one: dict[str, Any], place: int) -> float | None:
    layers = one["rounds"][place]["layers"].values()
    found = [layer[key] for layer in layers for key in ("before", "removed") if key in layer]
    return statistics.mean(found) if found else None


def _number(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.mean(found):.4f}" if found else "-"


def privacy_lines(out: Path) -> list[str]:
    """The table of private runs."""
    runs = kept(out, "privacy")
    if not runs:
        return []
    lines = ["| method | " + " | ".join("no noise" if not e else f"epsilon {e:g}" for e in EPSILONS) + " |",
             "|---" * (len(EPSILONS) + 1) + "|"]  # fmt: skip
    for name in PRIVATE:
        cells = []
        for epsilon in EPSILONS:
            mine = [one for one in runs if one["label"].startswith(f"privacy {name} epsilon {epsilon:g} seed ")]
            spent = max((one["epsilon"] or 0.0 for one in mine), default=0.0)
            accuracy = spread([one["measures"]["accuracy"] for one in mine], 100) if mine else "not run"
            cells.append(accuracy + (f" (spent {spent:.2f})" if spent else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(given: argparse.Namespace) -> None:
    """Write ``benchmarks/results/federated.md`` from what was run."""
    lines = ["# Federated training", "", *(__doc__ or "").strip().splitlines()[2:8], ""]
    for base in ("emoji-vit", "emoji-mixer"):
        table = method_lines(given.out, base)
        if table:
            label = kept(given.out, f"methods {base}".replace(" ", "-")) or [
                one for one in kept(given.out, "methods") if base in one["label"]
            ]
            rounds, epochs = len(label[0]["rounds"]), label[0]["config"]["training"]["epochs"]
            lines += [f"## {base}: {rounds} rounds of {epochs} local epoch(s)", "", *table, ""]
    if not kept(given.out, "methods"):
        lines += ["Accuracy, bias and the privacy table have not been run yet.", ""]
    table = privacy_lines(given.out)
    if table:
        one = kept(given.out, "privacy")[0]
        seeds = len({run_["config"]["seed"] for run_ in kept(given.out, "privacy")})
        lines += [
            f"## Sample-level privacy: {len(one['rounds'])} rounds of {one['config']['training']['steps']} steps, "
            f"batch {one['config']['training']['batch_size']}, C = 1, delta 1e-4, {seeds} seed(s)", "",
            "Mean accuracy (%).", "", *table, "",
        ]  # fmt: skip
    events = deployment_lines(given.out)
    if events:
        head = "## Deployment: a server and three clients as processes, TLS and keys, FedEx-LoRA"
        lines += [head, "", *events, ""]
    told = "Numbers per round and client; heads are not counted."
    lines += ["## Traffic by count", "", told, "", *traffic_lines(), ""]
    print(files.write_text(RESULTS / "federated.md", "\n".join(lines)))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "privacy", "traffic", "deployment", "report"))
    parser.add_argument("--data", type=Path, default=Path("emoji"))
    parser.add_argument("--out", type=Path, default=Path("federated-runs"))
    parser.add_argument("--bases", nargs="+", default=["emoji-vit"])
    parser.add_argument("--names", nargs="*", default=[], help="methods; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=160, help="deployment: rows of a client")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of private runs")
    given = parser.parse_args()
    if given.what == "traffic":
        print("\n".join(traffic_lines()))
        return
    {"methods": methods, "privacy": privacy, "deployment": deployment, "report": report}[given.what](given)


if __name__ == "__main__":
    main()
