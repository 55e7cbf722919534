"""Labelled emoji in several artists' styles: the federated benchmark's data, its bases and the shipped sample.

``python -m assets.build.emoji_domains --out FOLDER`` fetches the pinned npm packages, draws every emoji that all styles
have at 32 x 32 pixels into one strip of tiles per style (domain), and writes ``rows.jsonl`` (image, tile, label,
domain, code) and ``bases.jsonl`` (the style that bases learn). Labels are groups of Unicode's own classes; flags are
left out, because one style draws them as empty boxes. Rows of one emoji share ``code``, by which training and test rows
are told apart: the same emoji in another style is nearly the same picture.

``--bases`` also trains classifiers on ``bases.jsonl``: the benchmark's know OpenMoji, the embedded ones
(``--style noto-v1``) art under Apache-2.0. ``--sample`` writes the sample shipped in ``assets/federated`` (Apache-2.0
and MIT art only).
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapters import files
from assets.build.common import build_dir
from assets.build.data import fetch_packages

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/noto-v1": "1.2.5",
    "emojibase-data": "17.0.0",
}
DOMAINS = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
"""The clients' styles."""

STYLES = ("openmoji", "noto-v1")
"""Styles that bases learn."""

SAMPLE = {"domains": ("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast"), "per_label": 6}
"""The shipped sample; its licences allow any use with the notices kept."""

SIDE = 32
CAP = 130
"""Most emoji of one label."""

GROUPS = {
    "face": ("face",), "heart": ("heart",), "animal": ("animal",), "plant": ("plant",), "food": ("food", "drink"),
    "person": ("person", "family"), "hand": ("hand", "body"), "transport": ("transport",), "place": ("place",),
    "weather": ("sky",), "clothing": ("clothing",), "clock": ("time",),
}  # fmt: skip
"""Label -> beginnings of Unicode's subgroups; other symbols are 'symbol', other things 'object'."""


def label_of(group: str, subgroup: str) -> str:
    """The label of an emoji, empty for those that are left out (flags, skin tones)."""
    if group in ("flags", "component"):
        return ""
    found = next((label for label, starts in GROUPS.items() if subgroup.startswith(starts)), "")
    return found or ("symbol" if group == "symbols" else "object")


def emoji(modules: Path) -> list[tuple[str, str]]:
    """(code points, label) of every emoji without skin tones, in Unicode's order."""
    data = json.loads((modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    words = json.loads((modules / "emojibase-data/meta/groups.json").read_text(encoding="utf-8"))
    found = []
    for entry in data:
        if "group" not in entry:
            continue
        label = label_of(words["groups"][str(entry["group"])], words["subgroups"][str(entry["subgroup"])])
        if label:
            found.append((str(entry["hexcode"]).lower().replace("-fe0f", ""), label))
    return found


def icons(modules: Path, domain: str) -> dict[str, str]:
    """Code points -> SVG of every emoji of a style; a style without code points has Noto's names."""
    place = modules / "@iconify-json" / domain
    kept = json.loads((place / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((place / "chars.json").read_text(encoding="utf-8"))
    names = names or json.loads((place.parent / "noto" / "chars.json").read_text(encoding="utf-8"))
    width, height = kept.get("width", 16), kept.get("height", 16)
    found = {}
    for code, name in names.items():
        icon = kept["icons"].get(name)
        if icon is not None:
            box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
            found[code.replace("-fe0f", "")] = f"{head}{icon['body']}</svg>"
    return found


def drawn(svg: str) -> Image.Image:
    """An SVG on white, :data:`SIDE` pixels square."""
    import resvg_py

    made = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)))).convert("RGBA")
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    place = ((SIDE - made.width) // 2, (SIDE - made.height) // 2)
    white.alpha_composite(made, place)
    return white.convert("RGB")


def common(modules: Path, domains: Sequence[str], cap: int = CAP) -> list[tuple[str, str]]:
    """(code points, label) of emoji that all ``domains`` have, at most ``cap`` of a label."""
    sets = [icons(modules, domain) for domain in domains]
    counted: Counter[str] = Counter()
    found = []
    for code, label in emoji(modules):
        if all(code in one for one in sets) and counted[label] < cap:
            counted[label] += 1
            found.append((code, label))
    return found


def write(modules: Path, out: Path, domains: Sequence[str], chosen: Sequence[tuple[str, str]], name: str) -> None:
    """Write a strip for each domain and the rows."""
    lines = []
    for domain in domains:
        art = icons(modules, domain)
        strip = Image.new("RGB", (SIDE * len(chosen), SIDE), "white")
        for tile, (code, label) in enumerate(chosen):
            strip.paste(drawn(art[code]), (tile * SIDE, 0))
            row = {"image": f"{domain}.png", "tile": tile, "label": label, "domain": domain, "code": code}
            lines.append(json.dumps(row))
        files.write(out / f"{domain}.png", lambda part, strip=strip: strip.save(part, format="PNG", optimize=True))
    files.write_text(out / name, "\n".join(lines) + "\n")


def attribution(modules: Path, domains: Sequence[str]) -> str:
    """Where the art is from, as the packages say."""
    lines = ["Emoji art, drawn at 32 x 32 pixels on white; from npm packages:", ""]
    for domain in domains:
        package = f"@iconify-json/{domain}"
        about = json.loads((modules / package / "info.json").read_text(encoding="utf-8"))
        lines.append(
            f"{domain}.png: {about['name']} by {about['author']['name']}, {about['license']['spdx']}, "
            f"{about['license']['url']} ({package} {PACKAGES[package]})"
        )
    return "\n".join(lines) + "\n"


def build(out: Path, sample: bool, style: str) -> dict[str, int]:
    """Fetch, draw and write; returns how many emoji of each label."""
    modules = fetch_packages(build_dir(), PACKAGES)
    if sample:
        domains = SAMPLE["domains"]
        chosen = common(modules, DOMAINS, SAMPLE["per_label"])  # type: ignore[arg-type]
        write(modules, out, domains, chosen, "rows.jsonl")  # type: ignore[arg-type]
        files.write_text(out / "ATTRIBUTION", attribution(modules, domains))  # type: ignore[arg-type]
    else:
        chosen = common(modules, (*DOMAINS, STYLES[0]))
        write(modules, out, DOMAINS, chosen, "rows.jsonl")
        known = icons(modules, style)
        write(modules, out, (style,), [pair for pair in chosen if pair[0] in known], "bases.jsonl")
        files.write_text(out / "ATTRIBUTION", attribution(modules, (*DOMAINS, style)))
    return dict(Counter(label for _, label in chosen))


# ------------------------------------------------------------------------------------------------ bases


def train_base(kind: str, data: Path, style: str, held: set[str], steps: int, seed: int = 0) -> tuple[Any, float]:
    """A classifier trained from nothing on the base's style, and its accuracy on ``held`` codes of that style."""
    import torch

    rows = [json.loads(line) for line in (data / "bases.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    strip = np.asarray(Image.open(data / f"{style}.png"))
    tiles = np.stack([strip[:, row["tile"] * SIDE : (row["tile"] + 1) * SIDE] for row in rows])
    x = torch.from_numpy(tiles).float().permute(0, 3, 1, 2) / 127.5 - 1
    y = torch.tensor([labels.index(row["label"]) for row in rows])
    shown = torch.tensor([row["code"] not in held for row in rows])
    torch.manual_seed(seed)
    model = fresh(kind, labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    numbers = shown.nonzero().flatten()
    for _ in range(steps):
        batch = numbers[torch.randint(len(numbers), (64,), generator=generator)]
        pixels = x[batch].roll(tuple(torch.randint(-3, 4, (2,), generator=generator).tolist()), (2, 3))
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=y[batch]).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = (model(pixel_values=x[~shown]).logits.argmax(-1) == y[~shown]).float().mean()
    return model, float(right)


def fresh(kind: str, labels: Sequence[str]) -> Any:
    """An untrained tiny ViT or Mixer of 32 pixels."""
    numbers = {name: number for number, name in enumerate(labels)}
    names: Mapping[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": numbers}
    if kind == "emoji-mixer":
        from pipelines.vision.mixer import MixerConfig, MixerForImageClassification

        return MixerForImageClassification(MixerConfig(**names))
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=SIDE,
        patch_size=8, **names,
    ))  # fmt: skip


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", action="store_true", help="write the shipped sample instead")
    parser.add_argument("--bases", action="store_true", help="also train the embedded classifiers")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="what bases learn")
    given = parser.parse_args()
    counts = build(given.out, given.sample, given.style)
    print(f"{sum(counts.values())} emoji: {counts}")
    if given.bases:
        from studio.datasets.seeds import rng
        from studio.federation.partition import held_out_groups

        rows = [json.loads(line) for line in (given.out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        held = held_out_groups([row["code"] for row in rows], 0.3, rng(0, "test"))
        for kind in ("emoji-vit", "emoji-mixer"):
            model, accuracy = train_base(kind, given.out, given.style, {str(code) for code in held}, given.steps)
            model.half().save_pretrained(given.out / kind)
            print(f"{kind}: {accuracy:.3f} on held-out emoji of {given.style}")


if __name__ == "__main__":
    main()
