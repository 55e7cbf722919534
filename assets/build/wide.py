"""The shipped adapter ``three-across``: ``python -m assets.build.wide train --minutes 90``, then ``export``, ``score``.

tinymoji has seen pictures one and two times as wide as high. This LoRA, on all its layers and its text encoder, learns
pictures three times as wide (192 x 64), most of them with three subjects, on the base's own data, objective and loss of
attention (``assets.build.base``, ``assets.build.grounding``); the base and all that was made for it stay as they are.
A checkpoint is written every few minutes; the same command goes on from it. ``curve`` scores every kept average,
``score`` the shipped file, ``score --without`` the base: is each subject the judge's first answer in its own third?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.files import write_text
from adapters.formats.lora import LoraLayer
from adapters.low_rank import compact_svd
from assets.build import base, data, grounding
from assets.build import latents as cache
from assets.build.adapters import SHIPPED, judged_card
from assets.build.cards import percent
from assets.build.common import build_dir, pick_device, write_json
from assets.build.evaluate import GUIDANCE, STEPS, Case, score
from assets.build.judge import Judge, load_judge

NAME = "three-across"
ASPECT, RANK, SHIPPED_RANK = 3, 16, 8
"""Width over height of the pictures; the rank it learns with, and the rank it is shipped with."""
BASE = SHIPPED.parent / "models" / "tinymoji"
THIRDS = [(k / 3, 0.0, (k + 1) / 3, 1.0) for k in range(3)]
CASES = 104


def settings(**values: Any) -> Any:
    """What the adapter is, as a configuration of the image trainer: layers, file and card follow from it."""
    from studio.training.schemas.image import TrainImageConfig

    chosen = {"base": "tinymoji", "name": NAME, "data": ".", "mode": "captioned", "rank": RANK, "targets": "all"}
    return TrainImageConfig(**{**chosen, "train_text_encoder": True, "save_dtype": "fp16", **values})


def adapted_model() -> base.Model:
    """Return the shipped base in fp32 with an untrained LoRA on its layers; only that learns."""
    from studio.training.inject import inject, lora_config

    model, config = base.Model(), settings()
    base.load_weights(model, BASE)
    inject(model.unet, lora_config(model.unet, config))
    inject(model.text_encoder, lora_config(model.text_encoder, config, text=True))
    return model


class Run(base.Run):
    """A run in which only the LoRA learns."""

    def new_model(self) -> nn.Module:
        """Return the model; its cross-attention keeps what the grounding loss needs."""
        model = adapted_model()
        if self.device.type == "cpu":
            model.use_plain_attention()
        self.recorders = grounding.record(model.unet)
        return model

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the LoRA's matrices."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learning, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def cases(count: int = CASES) -> list[Case]:
    """Return three base subjects in every base style by turns, all wordings, on a white background."""
    rng = np.random.default_rng(2025)
    names, styles = list(data.BASE_CONCEPTS), list(data.BASE_STYLES)
    made = []
    for number in range(count):
        three = tuple(names[i] for i in rng.choice(len(names), 3, replace=False))
        style = styles[number % len(styles)]
        caption = data.make_caption(style, three, None, form=number // len(styles))
        made.append(Case(caption, 70_000 + number, style, three))
    return made


def judged(pipeline: Any, judge: Judge, drawn: Sequence[Case], batch: int = 8) -> tuple[dict[str, Any], Tensor]:
    """Draw the cases 192 x 64 and score them: all three right, and how many of the subjects; with the pictures."""
    pipeline.set_progress_bar_config(disable=True)
    pictures, hits = [], []
    for start in range(0, len(drawn), batch):
        now = drawn[start : start + batch]
        images = pipeline(
            prompt=[case.caption for case in now],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(case.seed) for case in now],
            height=data.SIZE,
            width=ASPECT * data.SIZE,
            output_type="pt",
        ).images.float()
        wanted = torch.tensor([[judge.index(name) for name in case.names] for case in now])
        found = torch.stack([judge.classify_region(images, box).argmax(1) for box in THIRDS], 1)
        hits.append(found == wanted)
        pictures.append(images)
    right = torch.cat(hits)
    made = {"all three": score(right.all(1).tolist()), "subjects": score(right.flatten().tolist())}
    return {**made, "steps": STEPS, "guidance": GUIDANCE}, torch.cat(pictures)


def smaller(layer: LoraLayer, rank: int = SHIPPED_RANK) -> LoraLayer:
    """The nearest update of a lower rank: half the size, and the judge sees little of it."""
    left, strengths, right = compact_svd(layer.B.float().flatten(1) * layer.scale, layer.A.float().flatten(1))
    roots = strengths[:rank].sqrt()
    A, B = roots[:, None] * right[:rank], left[:, :rank] * roots
    shapes = (len(A), *layer.A.shape[1:]), (*layer.B.shape[:1], len(A), *layer.B.shape[2:])
    return LoraLayer(A.reshape(shapes[0]).contiguous(), B.reshape(shapes[1]).contiguous(), float(len(A)))


def export(folder: Path, target: Path = SHIPPED / NAME) -> Path:
    """Write the averaged adapter with its card into ``target``."""
    from studio.datasets.cache import fingerprint
    from studio.training.export import make_recipe, write_adapter, write_card
    from studio.training.inject import lora_layers

    plain, model = base.Model(), adapted_model()
    base.load_weights(plain, BASE)
    facts = base.load_average(model, base.latest(folder))
    curve = json.loads((folder / "curve.json").read_text("utf-8"))["rows"]
    options = json.loads((folder / "options.json").read_text("utf-8"))
    config = settings(
        rank=SHIPPED_RANK, learning_rate=options["lr"], batch_size=options["batch"] // ASPECT, seed=options["seed"]
    )
    shards = [*cache.shard_folder(ASPECT).glob("[0-9]*.npy")]
    told = {"steps": facts["step"], "batch": config.batch_size, "loss": curve[-1][3], "seconds": 60 * curve[-1][2]}
    recipe = make_recipe(
        config,
        base={"name": "tinymoji", "family": "sd", "digest": fingerprint(plain.unet)},
        data={"pictures": cache.SHARD * len(shards), "digest": cache.shard_folder(ASPECT).parent.name,
              "example_prompt": "a flat icon of a dog, a cat and a sun", "resolution": data.SIZE},
        training=told,
    )  # fmt: skip
    parts = {"unet": lora_layers(model.unet), "text_encoder": lora_layers(model.text_encoder)}
    layers = {part: {name: smaller(layer) for name, layer in made.items()} for part, made in parts.items()}
    target.mkdir(parents=True, exist_ok=True)
    write_adapter(layers, target, NAME, config, recipe)
    card = write_card(target, recipe, [])
    told = f"- Rank {SHIPPED_RANK} (learned with {RANK}, cut by singular values)"
    text = card.read_text(encoding="utf-8").replace(f"- Rank {SHIPPED_RANK}", told)
    size = f"num_inference_steps={STEPS}, guidance_scale=4, height={data.SIZE}, width={ASPECT * data.SIZE})"
    text = text.replace("num_inference_steps=20)", size).replace(" and in `config.yaml`", "")
    write_text(card, text)
    return target


def train(options: argparse.Namespace) -> None:
    """Train, going on from the checkpoint if there is one."""
    folder = options.folder or build_dir() / NAME
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    run = Run(folder, pick_device(options.device), options.average)
    write_json(
        folder / "options.json", {key: getattr(options, key) for key in ("lr", "batch", "seed", "mix", "grounding")}
    )
    size = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    print(f"{size:.2f} M learning parameters, from step {run.step}", flush=True)
    base.train(run, {ASPECT: base.Scenes(cache.shard_folder(ASPECT))}, options)


def curve(folder: Path, count: int) -> None:
    """Score every kept average that has no score yet, on the first ``count`` cases: ``curve-scores.json``."""
    target = folder / "curve-scores.json"
    rows: dict[str, Any] = json.loads(target.read_text("utf-8")) if target.is_file() else {}
    judge, model = load_judge(), adapted_model()
    for file in sorted(folder.glob("average-*.pt")):
        if file.stem.removeprefix("average-") in rows:
            continue
        facts = base.load_average(model, file)
        scores, _ = judged(base.make_pipeline(model), judge, cases()[:count])
        rows[f"{facts['step']:06d}"] = {"samples": facts["samples"], **scores}
        write_json(target, rows)
        print(facts, percent(scores["all three"]), percent(scores["subjects"]), flush=True)


def judge_shipped(folder: Path | None, count: int) -> dict[str, Any]:
    """Score the shipped adapter (None: the base alone); writes score, samples and card of the adapter."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    if folder is not None:
        pipeline.load_lora_weights(folder / f"{NAME}.safetensors")
    scores, images = judged(pipeline, load_judge(), cases()[:count])
    if folder is not None:
        pictures = [(image.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8) for image in images]
        data.save_sheet(folder / "samples.png", data.contact_sheet(pictures[:24], 4))
        data.save_png(folder / "preview.png", pictures[0])
        write_json(folder / "score.json", scores)
        lines = [
            f"- Judged alone, 192 x 64, {name} right: {percent(scores[name])}" for name in ("all three", "subjects")
        ]
        card = folder / "card.md"
        write_text(card, judged_card(card.read_text(encoding="utf-8"), lines))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, or score."""
    parser = base.new_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("train", "curve", "export", "score"))
    parser.add_argument("--without", action="store_true", help="score the base alone")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.set_defaults(mix=[0.1, 0.2, 0.7], batch=18, lr=1e-3, average=0.99)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = options.folder or build_dir() / NAME
    if options.command == "train":
        train(options)
    elif options.command == "curve":
        curve(folder, options.cases)
    elif options.command == "export":
        print(f"wrote {export(folder)}")
    else:
        scores = judge_shipped(None if options.without else SHIPPED / NAME, options.cases)
        print(*(f"{name}: {percent(scores[name])}" for name in ("all three", "subjects")), sep="\n")


if __name__ == "__main__":
    main()
