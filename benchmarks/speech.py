"""S2-LoRA, AdaLoRA and LoRA on Whisper tiny.en, on simulated child speech; one seed per run, small budgets.

    python -m benchmarks.speech data --sounds /usr/share/asterisk/sounds/en_US_f_Allison
    python -m benchmarks.speech run base lora s2 s2-sparse
    python -m benchmarks.speech table

The child's voice is espeak-ng's (``-v en-us+f5 -p 99 -s 150``, resampled by 1.25), so it is simulated child speech and
nothing else; the sentences come from a small grammar. Out of domain are real recordings of an adult: Asterisk's prompts
of digits, letters and the phonetic alphabet, whose names are their texts. Windows are 4 s for all, the base included.
Runs are resumable: what is in the results is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.speech import audio
from studio.datasets import utterances

RESULTS = Path(__file__).parent / "results" / "speech.json"
TABLE = RESULTS.with_suffix(".md")
PLACE = Path("/tmp/speech_benchmark")

TRAIN, TEST, WINDOW, STEPS, BATCH = 150, 40, 4, 40, 4
COMMON: dict[str, Any] = {
    "base": "whisper-tiny.en", "window": WINDOW, "steps": STEPS, "batch_size": BATCH, "targets": "linear",
    "learning_rate": 1e-3, "warmup_ratio": 0.1, "validation_answers": TEST, "validation_every": 10**6,
    "sample_every": 0, "save_every": 0, "checkpoint_every": 0, "device": "cpu",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "s2": {"rank": 32, "s2_share": "shape", "s2_sparsity": 0.0},
    "s2-sparse": {"rank": 32, "s2_share": "shape", "s2_sparsity": 0.3},
}

WHO = ("the boy", "the girl", "my mother", "a small dog", "the teacher", "our cat", "the old man", "a bird")
DOES = ("sees", "likes", "finds", "carries", "wants", "draws")
WHAT = ("a red ball", "the big tree", "two apples", "a blue boat", "the yellow sun", "some bread", "a paper star")
WHERE = ("in the garden", "at school", "near the river", "on the table", "after lunch", "every day")
PHONETIC = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima",
            "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey",
            "xray", "yankee", "zulu")  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
          "thirteen")  # fmt: skip


def sentences(seed: int = 0) -> list[str]:
    """Different sentences of the grammar, those to learn from first."""
    everything = [f"{who} {does} {what} {where}" for who in WHO for does in DOES for what in WHAT for where in WHERE]
    return random.Random(seed).sample(everything, TRAIN + TEST)


def make(espeak: str, sounds: str, place: Path) -> None:
    """Write ``child`` (with ``test``) and ``adult`` as folders of recordings with texts."""
    for number, text in enumerate(sentences()):
        folder = place / ("child" if number < TRAIN else "child-test")
        folder.mkdir(parents=True, exist_ok=True)
        spoken = folder / f"{number:03}.wav"
        command = [espeak, "-v", "en-us+f5", "-p", "99", "-s", "150", "-w", str(spoken), text]
        subprocess.run(command, check=True, capture_output=True)
        sound = audio.read(spoken)
        raised = np.interp(np.arange(0, len(sound.samples), 1.25), np.arange(len(sound.samples)), sound.samples)
        write(spoken, raised.astype(np.float32))
        spoken.with_suffix(".txt").write_text(text)
    adult = place / "adult"
    adult.mkdir(parents=True, exist_ok=True)
    real = Path(sounds)
    known = {real / "digits" / f"{number}.wav": word for number, word in enumerate(DIGITS)}
    known |= {real / "phonetic" / f"{word[0]}_p.wav": word for word in PHONETIC}
    for file, word in known.items():
        if file.is_file():
            shutil.copy(file, adult / f"{word}.wav")
            (adult / f"{word}.txt").write_text(word)


def write(path: Path, samples: np.ndarray) -> None:
    """Samples at 16 kHz as a 16-bit file."""
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def measured(adapter: str | None, place: Path) -> dict[str, Any]:
    """Error rates on both test sets."""
    from pipelines.speech.adapters import AdaptedSpeech
    from pipelines.speech.loading import open_model
    from pipelines.speech.scores import score
    from pipelines.speech.transcribe import said
    from studio import library

    base = open_model(library.resolve_speech("whisper-tiny.en"), window=WINDOW)
    adapted, weights = AdaptedSpeech(base), {}
    if adapter:
        adapted.add("it", Path(adapter))
        weights = {"it": 1.0}
    found: dict[str, Any] = {}
    for name in ("child-test", "adult"):
        items = utterances.utterances(utterances.scan(str(place / name)))
        heard: list[str] = []
        with adapted.active(weights) as model:
            for start in range(0, len(items), 8):
                heard += said(base, model, [item.open().samples for item in items[start : start + 8]])
        found[name] = score([item.text for item in items], heard, "en", base.tokenizer).as_dict()
        found[f"{name} first"] = [[item.text, text] for item, text in zip(items[:3], heard[:3], strict=True)]
    return found


def run(name: str, place: Path, seed: int) -> dict[str, Any]:
    """Train and measure one row of the table."""
    if name == "base":
        return {**measured(None, place), "parameters": 0, "seconds": 0.0}
    import studio

    folder = place / "runs" / f"{name}-{seed}"
    values = {"data": str(place / "child"), "name": name, "seed": seed, **COMMON, **RUNS[name]}
    done = studio.train("speech", folder=folder, **values)
    found = {**measured(done["adapter"], place), "parameters": done["parameters"], "seconds": done["seconds"],
             "first_loss": done["first_loss"], "loss": done["loss"]}  # fmt: skip
    native = Path(done["adapter"]) / "s2_weights.safetensors"
    if native.is_file():
        from safetensors.torch import load_file

        tensors = load_file(native)
        v = np.concatenate([tensor.numpy().ravel() for key, tensor in tensors.items() if key.startswith("v.")])
        found |= {"zeros": float((v == 0).mean()), "native_bytes": native.stat().st_size,
                  "lora_bytes": (Path(done["adapter"]) / "adapter_model.safetensors").stat().st_size}  # fmt: skip
    return found


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# Adapters of Whisper tiny.en on simulated child speech",
        "",
        f"{TRAIN} sentences to learn from, {TEST} to measure with, {STEPS} steps of batch {BATCH}, windows of {WINDOW}",
        "seconds (`python -m benchmarks.speech`). The child is espeak-ng: simulated. Out of domain: real single",
        "words of an adult (Asterisk prompts). CER counts at most as many errors per recording as it has characters.",
        "",
        "| run, seed | trained numbers | child CER | child WER | adult CER | child loops | zeros | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        child, adult = one["child-test"], one["adult"]
        zeros = f"{one['zeros']:.0%}" if "zeros" in one else "-"
        lines.append(
            f"| {name} | {one['parameters']:,} | {child['capped_cer']:.3f} | {child['wer']:.3f} | "
            f"{adult['capped_cer']:.3f} | {child['loops']:.0%} | {zeros} | {one['seconds']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("data", "run", "table"))
    parser.add_argument("names", nargs="*", choices=["base", *RUNS, []])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument("--espeak", default="espeak-ng")
    parser.add_argument("--sounds", default="/usr/share/asterisk/sounds/en_US_f_Allison")
    given = parser.parse_args()
    if given.what == "data":
        make(given.espeak, given.sounds, given.place)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in given.names:
        key = name if name == "base" else f"{name}, {given.seed}"
        if key not in results:
            begun = time.time()
            results[key] = run(name, given.place, given.seed)
            print(key, {k: v for k, v in results[key].items() if "first" not in k}, f"{time.time() - begun:.0f} s")
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(results))


if __name__ == "__main__":
    main()
