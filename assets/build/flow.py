"""Train tinydit, the flow-matching base in Z-Image's format: ``python -m assets.build.flow --until 16:55``.

A ``Qwen3Model`` reads the caption, a ``ZImageTransformer2DModel`` (single stream: picture and caption tokens
attend to one another in every layer) predicts the velocity x - e. Both learn together from the lessons of
``assets.build.lessons``. Checkpoints, resuming and learning rate are those of ``assets.build.base``.

The training forward below is :meth:`ZImageTransformer2DModel.forward` for batches of equally large pictures
and captions of at most 32 tokens: same modules, same numbers, fewer copies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer, Qwen3Config, Qwen3Model

import assets
from assets.build import base, grounding, lessons, text
from assets.build import latents as cache
from assets.build.base import load_average as load_average
from assets.build.common import Both, autocast, build_dir, gradient_norm, pick_device

FOLDER = "flow"
"""Where the checkpoints lie in the build folder."""

CAPTION = 32
"""Tokens per caption, begin and end included: what Z-Image pads captions to a multiple of."""

PATCH = 2
WIDTH, HEADS, LAYERS = 256, 8, 6
SHIFT = 1.5
"""How far sampling keeps to the noisy side: s -> 1.5 s / (1 + 0.5 s)."""

GROUNDED = (1, 2, 3)
"""Layers whose attention is taught where each subject stands."""

AXES = (8, 12, 12)
"""Part of each head's 32 values that turns with the place in the sequence, the row and the column."""


def new_text_encoder(vocabulary: int, width: int = 192) -> Qwen3Model:
    """Return an untrained Qwen3 encoder of two layers; Z-Image reads what goes into the last one."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def new_transformer(width: int = 192) -> ZImageTransformer2DModel:
    """Return an untrained denoiser of four-channel latents; ``width`` is the text encoder's."""
    made = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        in_channels=4,
        dim=WIDTH,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=width,
        axes_dims=list(AXES),
        axes_lens=[1024, 64, 64],
    )
    _begin(made)
    return made


def _begin(model: ZImageTransformer2DModel) -> None:
    """Let every modulated block begin with the same half-open gates, and the answer with zero."""
    for block in (*model.noise_refiner, *model.layers):
        linear = block.adaLN_modulation[0]
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        scale = linear.bias.detach().view(4, -1)
        scale[1], scale[3] = 0.25, 0.25
    final = model.all_final_layer[f"{PATCH}-1"]
    nn.init.zeros_(final.linear.weight)
    nn.init.zeros_(final.linear.bias)
    nn.init.zeros_(final.adaLN_modulation[1].weight)
    nn.init.zeros_(final.adaLN_modulation[1].bias)
    nn.init.normal_(model.cap_pad_token, std=0.02)


def rotations(height: int, width: int) -> Tensor:
    """Return cosine and sine of every token's turn: fp32 ``(2, tokens, 16)``, picture tokens first, then the caption's.

    ``height`` and ``width`` count patches. The caption stands at places 1..32 of the first axis, the picture at 33.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([torch.full_like(rows, CAPTION + 1), rows, columns], -1).view(-1, 3)
    caption = torch.stack([torch.arange(1, CAPTION + 1), *2 * [torch.zeros(CAPTION, dtype=torch.long)]], -1)
    places = torch.cat([picture, caption]).double()
    turns = [
        places[:, axis, None] / 256.0 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        for axis, size in enumerate(AXES)
    ]
    angles = torch.cat(turns, -1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of each head: ``x`` (B, heads, tokens, 32), ``rotation`` (2, tokens, 16)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(x.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def norm(x: Tensor, module: nn.Module) -> Tensor:
    """Apply an RMSNorm module of diffusers."""
    return functional.rms_norm(x, x.shape[-1:], module.weight.to(x.dtype), module.eps)  # type: ignore[no-any-return]


def attend(layer: Any, x: Tensor, rotation: Tensor, seen: list[Tensor] | None = None) -> Tensor:
    """Self-attention of one block; ``seen`` is given its probabilities (B, heads, tokens, tokens)."""
    q, k, v = (getattr(layer, f"to_{n}")(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
    q, k = turn(norm(q, layer.norm_q), rotation), turn(norm(k, layer.norm_k), rotation)
    shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
    if seen is not None:
        seen.append(shares)
    return layer.to_out[0]((shares @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def block(layer: Any, x: Tensor, rotation: Tensor, time: Tensor | None, seen: list[Tensor] | None = None) -> Tensor:
    """One block, modulated by the time's embedding (B, 256) if it has that; ``seen`` as in :func:`attend`."""
    if time is None:
        x = x + norm(attend(layer.attention, norm(x, layer.attention_norm1), rotation), layer.attention_norm2)
        return x + norm(layer.feed_forward(norm(x, layer.ffn_norm1)), layer.ffn_norm2)  # type: ignore[no-any-return]
    scale_a, gate_a, scale_f, gate_f = layer.adaLN_modulation(time)[:, None].chunk(4, -1)
    told = attend(layer.attention, norm(x, layer.attention_norm1) * (1 + scale_a), rotation, seen)
    x = x + gate_a.tanh() * norm(told, layer.attention_norm2)
    made = layer.feed_forward(norm(x, layer.ffn_norm1) * (1 + scale_f))
    return x + gate_f.tanh() * norm(made, layer.ffn_norm2)  # type: ignore[no-any-return]


def patches(x: Tensor) -> Tensor:
    """Cut latents (B, C, H, W) into rows of patches: (B, H/2 * W/2, 4 C), the channel fastest."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def unpatch(x: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`patches` for latents ``height`` x ``width``."""
    b, _, wide = x.shape
    c = wide // 4
    return x.view(b, height // 2, width // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


class Model(nn.Module):
    """Text encoder and denoiser, trained as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block
        self.text_encoder = new_text_encoder(len(text.tokenizer()))
        self.transformer = new_transformer(self.text_encoder.config.hidden_size)

    def words(self, tokens: Tensor) -> Tensor:
        """Return caption features (B, 32, width) of token ids (B, 32): what the encoder's last layer is given."""
        encoder = self.text_encoder
        x = encoder.embed_tokens(tokens)
        places = encoder.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])
        return encoder.layers[0](x, position_embeddings=places)  # type: ignore[no-any-return]

    def forward(
        self,
        noisy: Tensor,
        times: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        rotation: Tensor,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Predict x - e.

        ``noisy`` (B, 4, H, W), ``times`` (B,) 0 for noise to 1 for the picture, ``tokens`` (B, 32) with ``lengths``
        (B,) of the captions, ``rotation`` from :func:`rotations`. ``seen`` is given what picture tokens
        attend to among the caption's in the layers :data:`GROUNDED`: (B, heads, picture tokens, 32) each.
        """
        model = self.transformer
        height, width = noisy.shape[-2:]
        count = height * width // 4
        time = model.t_embedder(times * model.t_scale)
        x = model.all_x_embedder["2-1"](patches(noisy))
        for layer in model.noise_refiner:
            x = self.block(layer, x, rotation[:, :count], time)
        c = model.cap_embedder[1](norm(self.words(tokens), model.cap_embedder[0]))
        real = torch.arange(CAPTION, device=tokens.device) < lengths[:, None]
        c = torch.where(real[..., None], c, model.cap_pad_token.to(c.dtype))
        for layer in model.context_refiner:
            c = self.block(layer, c, rotation[:, count:], None)
        x = torch.cat([x, c], 1)
        for number, layer in enumerate(model.layers):
            told: list[Tensor] | None = [] if seen is not None and number in GROUNDED else None
            x = self.block(layer, x, rotation, time, told)
            if seen is not None and told:
                seen.append(told[0][:, :, :count, count:])
        final = model.all_final_layer["2-1"]
        scale = 1 + final.adaLN_modulation(time)[:, None]
        return unpatch(final.linear(final.norm_final(x[:, :count]) * scale), height, width)


def inside_blocks(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix inside the blocks."""
    return any(k in name for k in (".attention.", "feed_forward", "layers.0.")) and min(parameter.shape) > 1


def borrow_words(model: Model, teacher: Path) -> None:
    """Let the token embedding begin as tinymoji's: the two have one vocabulary."""
    weights = load_file(teacher / "text_encoder" / "model.safetensors")
    (name,) = (n for n in weights if n.endswith("token_embedding.weight"))
    with torch.no_grad():
        model.text_encoder.embed_tokens.weight.copy_(weights[name].float())


class Run(base.Run):
    """A training run of :class:`Model`."""

    def new_model(self) -> nn.Module:
        """Return the untrained model with tinymoji's token embedding."""
        model = Model()
        borrow_words(model, Path(assets.__file__).parent / "models" / "tinymoji")
        return model

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return Muon and AdamW."""
        return Both(self.model, inside_blocks)


class Lessons:
    """The lessons of one aspect: noisy pictures, targets, noise levels, captions; looks for new ones when told."""

    def __init__(self, aspect: int) -> None:
        self.aspect = aspect
        self.known: list[Path] = []
        self.arrays: list[np.ndarray] = []
        self.facts: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []
        self.marks: list[np.ndarray] = []
        self.boxes: list[np.ndarray] = []
        self.rows: list[list[np.ndarray]] = []
        self.scenes: dict[str, tuple[np.ndarray, ...]] = {}
        self.look()

    def look(self) -> None:
        """Add lessons that have appeared."""
        folder = lessons.lesson_folder(self.aspect)
        for found in sorted(f for f in folder.glob("[0-9]*.npy") if not f.name.endswith(".facts.npy")):
            if found in self.known:
                continue
            shard = found.stem.split("-")[1]
            if shard not in self.scenes:
                self.scenes[shard] = self._scenes(folder.parent / f"{shard}.npy")
            facts = np.load(found.with_suffix(".facts.npy"))
            tokens, marks, boxes, counts = self.scenes[shard]
            emptied = facts[:, 1] > 0.5
            self.known.append(found)
            self.arrays.append(np.load(found, mmap_mode="r"))
            self.facts.append(facts)
            self.tokens.append(np.where(emptied[:, None], text.encode([""])[:, :CAPTION], tokens))
            self.marks.append(marks & ~emptied[:, None, None])
            self.boxes.append(boxes)
            self.rows.append([np.flatnonzero(counts == number) for number in range(1, grounding.MOST + 1)])

    @staticmethod
    def _scenes(file: Path) -> tuple[np.ndarray, ...]:
        """Return a shard's token ids, the tokens and the boxes of each subject, and the numbers of subjects."""
        _, records = cache.load_shard(file)
        scenes: list[Any] = [record["subjects"] for record in records]
        names = [[subject["concept"] for subject in scene] for scene in scenes]
        captions = [str(record["caption"]) for record in records]
        marks = grounding.subject_tokens(text.tokenizer(), captions, names, CAPTION)
        boxes = np.stack([grounding.boxes_of(record) for record in records])
        return text.encode(captions)[:, :CAPTION], marks, boxes, np.asarray([len(scene) for scene in scenes])

    def draw(self, rng: np.random.Generator, size: int, mix: Sequence[float]) -> tuple[Tensor, ...]:
        """Draw ``size`` rows; ``mix`` are the shares of one, two and three subjects.

        Returns noisy and target fp32 ``(size, 4, 16, 16 * aspect)``, noise levels, token ids ``(size, 32)``, and for
        the grounding loss the tokens ``(size, 3, 32)`` and boxes ``(size, 3, 4)`` of each subject.
        """
        share = np.asarray(mix, float)
        pairs = []
        for _ in range(size):
            lesson = int(rng.integers(len(self.known)))
            there = np.asarray([len(rows) > 0 for rows in self.rows[lesson]]) * share
            rows = self.rows[lesson][int(rng.choice(len(there), p=there / there.sum()))]
            pairs.append((lesson, int(rows[rng.integers(len(rows))])))
        both = torch.from_numpy(np.stack([self.arrays[a][r] for a, r in pairs])).float()
        sigmas = np.stack([self.facts[a][r, 0] for a, r in pairs])
        kept = (self.tokens, self.marks, self.boxes)
        rest = (torch.from_numpy(np.stack([part[a][r] for a, r in pairs])) for part in kept)
        return both[:, 0], both[:, 1], torch.from_numpy(sigmas), *rest


def open_lessons() -> dict[int, Lessons]:
    """Return the lessons by aspect. Raises ``FileNotFoundError`` when there are none on square pictures."""
    kinds = {aspect: Lessons(aspect) for aspect in (1, 2)}
    if not kinds[1].known:
        raise FileNotFoundError("no lessons: run `python -m assets.build.lessons`")
    return kinds


def data_facts() -> dict[str, Any]:
    """Return what the card says of the data: noisy scenes by aspect."""
    counts = {aspect: len(list(lessons.lesson_folder(aspect).glob("*.facts.npy"))) for aspect in (1, 2)}
    return {"lesson rows": {str(aspect): count * cache.SHARD for aspect, count in counts.items()}}


def caption_lengths(tokens: Tensor, end: int) -> Tensor:
    """Return how many tokens of each row count: up to the first end token, that included. (B, L) -> (B,)."""
    return (tokens == end).int().argmax(1) + 1


def train_step(run: Run, kinds: dict[int, Lessons], options: argparse.Namespace, rate: float) -> tuple[float, float]:
    """Make one optimizer step and return the two losses: velocity and grounding."""
    rng = np.random.default_rng([options.seed, run.step])
    aspect = 2 if kinds[2].known and rng.random() < options.wide else 1
    noisy, wanted, sigmas, tokens, marks, boxes = kinds[aspect].draw(rng, options.batch // aspect, options.mix)
    lengths = caption_lengths(tokens, text.tokenizer().eos_token_id)
    parts = (noisy, 1 - sigmas, tokens, lengths, rotations(8, 8 * aspect))
    with autocast(run.device, options.dtype):
        seen: list[Tensor] | None = [] if options.grounding else None
        made = run.model(*(part.to(run.device) for part in parts), seen)
    loss = functional.mse_loss(made.float(), wanted.to(run.device))
    placed = grounding.grounding_loss(seen or [], marks.to(run.device), boxes.to(run.device), aspect)
    (loss + options.grounding * placed).backward()
    gradient_norm(list(run.model.parameters()), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.average.update(run.model)
    run.step += 1
    run.samples += len(noisy)
    return float(loss.detach()), float(placed.detach())


def new_tokenizer() -> CLIPTokenizer:
    """Return tinymoji's tokenizer with a chat template that says nothing more: Z-Image's pipeline asks for one."""
    made = text.tokenizer()
    return CLIPTokenizer.from_pretrained(
        made.name_or_path, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}", model_max_length=512
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler that the model ships with."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def make_pipeline(model: Model) -> ZImagePipeline:
    """Join the model with tinymoji's autoencoder into an ordinary pipeline."""
    vae = cache.load_vae(torch.device("cpu"))
    vae.register_to_config(shift_factor=0.0)  # which Z-Image's pipeline adds
    return ZImagePipeline(
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder.eval(),
        tokenizer=new_tokenizer(),
        transformer=model.transformer.eval(),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, resuming from the checkpoint if there is one."""
    parser = base.new_parser(__doc__)
    parser.set_defaults(batch=24, lr=2e-3, average=0.995, wide=0.2, seed=5)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (a minute or two at the start)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    run = Run(options.folder or build_dir() / FOLDER, pick_device(options.device), options.average)
    if options.compile:
        run.model.block = torch.compile(block, dynamic=False)
    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, from step {run.step}", flush=True)
    kinds = open_lessons()

    def look() -> None:
        for kind in kinds.values():
            kind.look()

    base.loop(run, lambda rate: train_step(run, kinds, options, rate), look, options)


if __name__ == "__main__":
    main()
