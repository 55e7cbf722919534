"""Regions inside the network against a slow reference in plain PyTorch, with two different adapters and prompts.

The reference knows nothing of the engine: it reads the files' matrices itself, forms every region's full weights
W0 + s B A, goes through the regions in a loop, computes each for the whole picture and adds them up by their shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from tests import tiny
from tests.pipelines.conftest import Bed, close, own_size

SIZE, STEPS, GUIDANCE, SEED = 32, 3, 4.0, 11
PROMPTS = ("a red apple", "a cat", "two dogs")
"""Of the background and of both regions."""

WEIGHTS, SCALES = (0.8, 1.3), (1.0, 0.5)
"""Strength of each adapter, factor of each region."""

UNET_BOXES = ((0, 0, 0.5, 1), (0.25, 0.25, 0.75, 1))  # they overlap in a quarter of the picture's width
JOINT_BOXES = ((0, 0, 0.5, 1), (0.5, 0.25, 1, 1))
Deltas = Sequence[dict[str, Tensor]]
"""For every row (the background first): module -> its change of the weight at full strength."""


def deltas(files: Sequence[Path], ratios: Sequence[float]) -> Deltas:
    """The rows' changes; ``ratios`` are alpha / rank."""
    made: list[dict[str, Tensor]] = [{}]
    for file, ratio, weight, scale in zip(files, ratios, WEIGHTS, SCALES, strict=True):
        tensors = load_file(file)
        row = {}
        for key, A in tensors.items():
            component, _, rest = key.partition(".")
            if component not in ("unet", "transformer") or ".lora_A" not in rest:
                continue
            B = tensors[key.replace("lora_A", "lora_B")]
            product = (B.flatten(1) @ A.flatten(1)).reshape(B.shape[0], *A.shape[1:])
            row[rest.removesuffix(".lora_A.weight")] = weight * scale * ratio * product
        made.append(row)
    return made


def shares(boxes: Sequence[Any], height: int, width: int) -> Tensor:
    """Share of the background and every region in each cell: (rows, height * width)."""
    masks = torch.zeros(len(boxes), height, width)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    made = torch.zeros(len(boxes) + 1, height, width)
    for y in range(height):
        for x in range(width):
            total = float(masks[:, y, x].sum())
            made[1:, y, x] = masks[:, y, x] / max(1.0, total)
            made[0, y, x] = 1 - made[1:, y, x].sum()
    return made.flatten(1)


def heads(tensor: Tensor, count: int) -> Tensor:
    return tensor.unflatten(2, (count, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt d) V, (batch, heads, tokens, width)."""
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value


def changed(module: Any, delta: Tensor, given: Tensor) -> Tensor:
    """What a change of the weight adds to the output."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(given, delta, None, module.stride, module.padding)
    return F.linear(given, delta)


def along(module: Any, weights: Tensor, output: Tensor) -> Tensor:
    """Weights (tokens,) so that they multiply ``output``."""
    return weights.view(1, 1, *output.shape[2:]) if isinstance(module, nn.Conv2d) else weights[None, :, None]


# UNet


class Cross:
    """Cross-attention, region by region."""

    def __init__(self, name: str, rows: Deltas, texts: Sequence[Tensor], share: Callable[[int], Tensor]) -> None:
        self.name, self.rows, self.texts, self.share = name, rows, texts, share

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, total = heads(attn.to_q(hidden_states), attn.heads), torch.zeros_like(hidden_states)
        share = self.share(hidden_states.shape[1])
        for number, (row, text) in enumerate(zip(self.rows, self.texts, strict=True)):
            weights = [
                layer.weight + row.get(f"{self.name}.{part}", torch.zeros(()))
                for part, layer in (("to_k", attn.to_k), ("to_v", attn.to_v), ("to_out.0", attn.to_out[0]))
            ]
            key, value = (heads(F.linear(text, weight), attn.heads) for weight in weights[:2])
            found = attend(query, key, value).transpose(1, 2).flatten(2)
            total = total + share[number][None, :, None] * F.linear(found, weights[2], attn.to_out[0].bias)
        return total


class Isolated:
    """Self-attention, cell by cell: one in a region does not see those that are in other regions only."""

    def __init__(self, share: Callable[[int], Tensor]) -> None:
        self.share = share

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = (heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        inside = self.share(hidden_states.shape[1])[1:] > 0
        found = torch.zeros_like(query)
        for cell in range(query.shape[2]):
            own = inside[:, cell]
            seen = [k for k, other in enumerate(inside.T) if not own.any() or not other.any() or (own & other).any()]
            found[:, :, cell] = attend(query[:, :, [cell]], key[:, :, seen], value[:, :, seen])[:, :, 0]
        return attn.to_out[0](found.transpose(1, 2).flatten(2))


def unet_reference(pipe: Any, rows: Deltas, texts: Sequence[Any], self_mask: bool, call: dict[str, Any]) -> Tensor:
    """The latents, every layer of every region computed for itself."""
    unet, factor = pipe.unet, 2

    def share(cells: int) -> Tensor:
        side = round(cells**0.5)
        return shares(UNET_BOXES, side, side)

    with ExitStack() as stack:

        def layer(name: str, module: Any) -> None:
            def hook(module: Any, args: Any, output: Tensor) -> Tensor:
                here = share(output.shape[2] * output.shape[3] if output.ndim == 4 else output.shape[1])
                for number, row in enumerate(rows):
                    if name in row:
                        output = output + along(module, here[number], output) * changed(module, row[name], args[0])
                return output

            stack.callback(module.register_forward_hook(hook).remove)

        def time_vector(name: str, block: Any) -> None:
            kept: list[Tensor] = []

            def keep(module: Any, args: Any, output: Tensor) -> None:
                kept[:] = [args[0]]

            def add(module: Any, args: Any) -> Any:
                cells = args[0]
                here = share(cells.shape[2] * cells.shape[3])
                for number, row in enumerate(rows):
                    if name in row:
                        vector = F.linear(kept[0], row[name])  # (batch, channels)
                        cells = cells + vector[:, :, None, None] * here[number].view(1, 1, *cells.shape[2:])
                return (cells,)

            stack.callback(block.time_emb_proj.register_forward_hook(keep).remove)
            stack.callback(block.norm2.register_forward_pre_hook(add).remove)

        for name, module in unet.named_modules():
            if isinstance(module, ResnetBlock2D):
                time_vector(f"{name}.time_emb_proj", module)
            elif isinstance(module, BasicTransformerBlock):
                module.attn2.set_processor(Cross(f"{name}.attn2", rows, texts, share))
                if self_mask:
                    module.attn1.set_processor(Isolated(share))
            elif isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith(
                ("time_emb_proj", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
            ):
                layer(name, module)
        result: Tensor = pipe(**call).images
    assert factor == pipe.vae_scale_factor
    return result


RATIOS = {"a": 4 / 2, "b": 1.5 / 3, "c": 2 / 2}
"""alpha / rank of the adapters of tests.pipelines.conftest."""


@pytest.mark.parametrize(
    ("family", "names", "self_mask"),
    [("sd", "ac", False), ("sd", "cb", False), ("sdxl", "ac", False), ("sd", "ac", True)],
)
def test_activation_on_a_unet(beds: Any, family: str, names: str, self_mask: bool) -> None:
    bed: Bed = beds(family)
    composer = MultiLoRAPipeline(bed.pipe())
    for name, weight in zip(names, WEIGHTS, strict=True):
        composer.load_lora(bed.files[name], name, weight=weight, te_weight=0)
    found = drawn(composer, names, UNET_BOXES, self_mask=self_mask)
    pipe = bed.pipe()
    encodings = [composer.family.encode(pipe, prompt, None, 1, True) for prompt in PROMPTS]
    texts = [torch.cat([e.negative["embeds"], e.positive["embeds"]]) for e in encodings if e.negative]
    rows = deltas([bed.files[name] for name in names], [RATIOS[name] for name in names])
    wanted = unet_reference(pipe, rows, texts, self_mask, {**encodings[0].call_arguments(), **plain()})
    close(found, wanted)


def plain() -> dict[str, Any]:
    """What diffusers is asked for."""
    return {
        "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": SIZE, "height": SIZE,
        "output_type": "latent", "generator": [torch.Generator().manual_seed(SEED)],
    }  # fmt: skip


def drawn(
    composer: MultiLoRAPipeline,
    names: str,
    boxes: Sequence[Any],
    prompts: Sequence[str] = PROMPTS,
    guidance: float = GUIDANCE,
    **options: Any,
) -> Tensor:
    """Our latents."""
    regions = [
        Region((name,), box=box, prompt=prompt, scale=scale)
        for name, box, prompt, scale in zip(names, boxes, prompts[1:], SCALES, strict=True)
    ]
    composer.compose("activation", regions=regions, **options)
    result: Tensor = composer(
        prompts[0], steps=STEPS, guidance_scale=guidance, width=SIZE, height=SIZE, seed=SEED, output_type="latent"
    ).images
    return result


# Joint transformers


class Joint:
    """Joint attention, region by region: a cell looks at all cells and at the text of its own region only."""

    def __init__(self, segment: int, share: Tensor, self_mask: bool) -> None:
        self.segment, self.share, self.self_mask = segment, share, self_mask

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, mask: Any = None,
        image_rotary_emb: Any = None, **ignored: Any,
    ) -> Any:  # fmt: skip
        picture = self.parts(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            text = self.parts(attn, encoder_hidden_states, *names)
            both = [torch.cat(pair, 2) for pair in zip(text, picture, strict=True)]
        else:
            both = picture
        if image_rotary_emb is not None:
            both[:2] = [
                apply_rotary_emb(tensor.transpose(1, 2), image_rotary_emb, sequence_dim=1).transpose(1, 2)
                for tensor in both[:2]
            ]
        texts = len(self.share) * self.segment
        query, key, value = both
        found = torch.zeros_like(query)
        for number, share in enumerate(self.share):
            mine = texts + share.nonzero().flatten()
            own = torch.arange(number * self.segment, (number + 1) * self.segment)
            cells = torch.arange(texts, query.shape[2])
            if self.self_mask and number:  # of the other regions' cells nothing is seen
                cells = texts + ((self.share[0] > 0) | (share > 0)).nonzero().flatten()
            seen = torch.cat([own, cells])
            found[:, :, mine] = attend(query[:, :, mine], key[:, :, seen], value[:, :, seen])
            seen = torch.cat([own, mine])
            found[:, :, own] = attend(query[:, :, own], key[:, :, seen], value[:, :, seen])
        found = found.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return found
        out = attn.to_out[0](found[:, texts:])
        return out, found[:, :texts] if attn.context_pre_only else attn.to_add_out(found[:, :texts])

    @staticmethod
    def parts(attn: Any, states: Tensor, names: Sequence[str], norms: Sequence[str]) -> list[Tensor]:
        made = [heads(getattr(attn, name)(states), attn.heads) for name in names]
        for k, norm in enumerate(norms):
            if getattr(attn, norm, None) is not None:
                made[k] = getattr(attn, norm)(made[k])
        return made


TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "context_embedder", "ff_context")


@pytest.mark.parametrize("self_mask", [False, True])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_activation_in_a_joint_transformer(tmp_path: Path, family: str, self_mask: bool) -> None:
    pipe = tiny.FAMILIES[family]()
    own = {
        "sd3": ("to_q", "to_out.0", "add_k_proj", "to_add_out", "ff_context.net.2", "ff.net.2"),
        "flux": ("to_q", "to_k", "add_v_proj", "to_add_out", "proj_mlp", "ff_context.net.2", "context_embedder"),
    }[family]
    files = [
        tiny.lora_file(pipe, tmp_path / "a", seed=1, rank=2, alpha=4.0, targets=own, text_targets=()),
        tiny.lora_file(pipe, tmp_path / "b", seed=2, rank=3, alpha=1.5, targets=(*own, "to_v"), text_targets=()),
    ]
    composer = MultiLoRAPipeline(tiny.FAMILIES[family]())
    for name, file, weight in zip("ab", files, WEIGHTS, strict=True):
        composer.load_lora(file, name, weight=weight)
    found = drawn(composer, "ab", JOINT_BOXES, self_mask=self_mask)

    guided = family == "sd3"
    encodings = [composer.family.encode(pipe, prompt, None, 1, guided) for prompt in PROMPTS]
    segment = encodings[0].positive["embeds"].shape[1]
    call = encodings[0].call_arguments()
    for key in ("prompt_embeds", *(("negative_prompt_embeds",) if guided else ())):
        call[key] = torch.cat([encoding.call_arguments()[key] for encoding in encodings], 1)
    rows, share = deltas(files, (2.0, 0.5)), shares(JOINT_BOXES, 8, 8)
    for name, module in pipe.transformer.named_modules():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            module.set_processor(Joint(segment, share, self_mask))
        if isinstance(module, nn.Linear) and any(name in row for row in rows):
            of_text = any(part in TEXT for part in name.split("."))
            single = name.startswith("single_transformer_blocks")
            module.register_forward_hook(token_hook(name, rows, share, segment, of_text, single))
    close(found, pipe(**call, **plain()).images)


def token_hook(name: str, rows: Deltas, share: Tensor, segment: int, of_text: bool, single: bool) -> Any:
    """Adds each row's change to its own segment of the text, and to the cells by its share."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        for number, row in enumerate(rows):
            if name not in row:
                continue
            text = torch.zeros(len(rows) * segment)
            text[number * segment : (number + 1) * segment] = 1
            weights = text if of_text else torch.cat([text, share[number]]) if single else share[number]
            output = output + weights[None, :, None] * F.linear(args[0], row[name])
        return output

    return hook


# Networks whose attention is torch's own: it is replaced by a loop over the rows

QUARTERS = ((0, 0, 0.5, 1), (0.5, 0.5, 1, 1))
"""Boxes that fit on a grid of 2 x 2 cells."""

EQUAL = ("a cat", "a dog", "a fox")
"""Prompts with as many tokens each."""

KINDS: dict[str, list[tuple[str, str]]] = {
    "auraflow": [
        (r"^context_embedder$", "prompt"),
        (r"add_|ff_context", "text"),
        (r"^single_", "joint"),
        ("", "image"),
    ],
    "cogview4": [(r"attn1", "joint"), (r"\.ff\.", "turns"), (r"norm1\.linear", "nowhere")],
    "ernie-image": [(r"^text_proj$", "text"), (r"self_attention", "joint"), (r"\.mlp\.", "in front")],
    "lumina2": [(r"norm1\.linear", "nowhere"), (r"^context_", "text"), (r"^noise_", "image"), (r"^layers", "joint")],
    "sana": [(r"attn2\.to_[kv]|^caption_", "text"), ("", "image")],
    "wan": [(r"attn2\.to_[kv]", "text"), ("", "image")],
}
"""Family -> regular expressions of names of layers, and which tokens they get."""


class Slow:
    """The same network, in which every row of the text and its cells are computed one after another.

    Args:
        leading: tokens that the denoiser puts before a text.
    """

    def __init__(self, family: str, share: Tensor, length: int, leading: int) -> None:
        self.family, self.share, self.length, self.leading = family, share, length, leading
        self.text_first = family not in ("ernie-image", "sana", "wan")
        self.segment = length + leading
        self.texts = len(share) * self.segment

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **ignored: Any) -> Tensor:
        rows, cells = len(self.share), self.share.shape[1]
        joint, only_text = query.shape[2] == self.texts + cells, query.shape[2] == self.texts
        if not joint and not only_text and key.shape[2] == cells:
            return attend(query, key, value)
        found = torch.zeros_like(query)
        for row in range(rows):
            text = torch.arange(row * self.segment, (row + 1) * self.segment)
            own = self.share[row].nonzero().flatten()
            picture = torch.arange(cells)
            if joint:
                text = text if self.text_first else text + cells
                own, picture = (own + self.texts, picture + self.texts) if self.text_first else (own, picture)
            if joint or only_text:
                seen = torch.cat([text, own]) if joint else text
                found[:, :, text] = attend(query[:, :, text], key[:, :, seen], value[:, :, seen])
            if not only_text:
                seen = torch.cat([text, picture]) if joint else text
                if attn_mask is not None and not joint:  # padding of the text
                    seen = seen[attn_mask[0, 0, 0, seen] == 0]
                found[:, :, own] = attend(query[:, :, own], key[:, :, seen], value[:, :, seen])
        return found

    def hook(self, name: str, rows: Deltas) -> Any:
        kind = next(kind for pattern, kind in KINDS[self.family] if re.search(pattern, name))
        calls = iter(range(10**6))

        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            turn = kind if kind != "turns" else "text" if next(calls) % 2 else "image"
            for number, row in enumerate(rows):
                if name in row:
                    output = output + self.weights(number, turn, output) * changed(module, row[name], args[0])
            return output

        return add

    def weights(self, number: int, kind: str, output: Tensor) -> Tensor:
        share = self.share[number]
        if kind == "nowhere":
            return share.mean()
        text, prompt = torch.zeros(self.texts), torch.zeros(len(self.share) * self.length)
        text[number * self.segment : (number + 1) * self.segment] = 1
        prompt[number * self.length : (number + 1) * self.length] = 1
        both = torch.cat([text, share] if self.text_first else [share, text])
        if kind == "in front":
            return both[:, None, None]
        if output.ndim == 4:
            return share.view(1, 1, *output.shape[2:])
        return {"text": text, "prompt": prompt, "image": share, "joint": both}[kind][None, :, None]


def stand_alone(pipe: Any, family: str, slow: Slow) -> None:
    """Give every row's text the positions, and the register tokens, of a text that is alone."""
    rows = len(slow.share)

    def placed(ids: Tensor) -> Tensor:
        ids, places = ids.clone(), torch.arange(slow.length).repeat(rows).to(ids)
        text = slice(0, slow.texts) if slow.text_first else slice(ids.shape[1] - slow.texts, None)
        ids[:, :, 0] = slow.length
        ids[:, text, 0] = places
        return ids

    if family == "lumina2":
        embedder = pipe.transformer.rope_embedder
        own = embedder._get_freqs_cis
        embedder._get_freqs_cis = lambda ids: own(placed(ids))
    elif family == "ernie-image":
        pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: (placed(args[0]),))
    elif family == "auraflow":
        registers = pipe.transformer.register_tokens

        def more(module: Any, args: Any, output: Tensor) -> Tensor:
            parts = [torch.cat([registers, part], 1) for part in output.split(slow.length, 1)]
            return torch.cat(parts, 1)[:, slow.leading :]

        pipe.transformer.context_embedder.register_forward_hook(more)


@pytest.mark.parametrize("family", [family for family in KINDS if family != "wan"])  # a video, in test_wan.py
def test_activation_against_a_loop_over_the_rows(beds: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    bed: Bed = beds(family)
    composer = MultiLoRAPipeline(bed.pipe())
    for name, weight in zip("ac", WEIGHTS, strict=True):
        composer.load_lora(bed.files[name], name, weight=weight)
    none = composer.family.no_guidance
    found = drawn(composer, "ac", QUARTERS, EQUAL, none)

    pipe = bed.pipe()
    encodings = [composer.family.encode(pipe, prompt, None, 1, False) for prompt in EQUAL]
    call, key = encodings[0].call_arguments(), "prompt_embeds"
    texts = [encoding.positive["embeds"] for encoding in encodings]
    if family == "ernie-image":
        texts = [text[0][None] for text in texts]
    elif family == "lumina2":
        texts = [text[:, : int(one.positive["mask"].sum())] for text, one in zip(texts, encodings, strict=True)]
    assert len({text.shape[1] for text in texts}) == 1
    joined = torch.cat(texts, 1)
    call[key] = [joined[0]] if family == "ernie-image" else joined
    if family == "sana":
        call["prompt_attention_mask"] = torch.cat([one.positive["mask"] for one in encodings], 1)
    elif family == "lumina2":
        call["prompt_attention_mask"] = torch.ones(joined.shape[:2], dtype=torch.long)
    side = SIZE // (pipe.vae_scale_factor * composer.family.layout.patch)
    share = shares(QUARTERS, side, side)
    slow = Slow(family, share, texts[0].shape[1], 8 if family == "auraflow" else 0)
    assert slow.texts != share.shape[1]
    rows = deltas([bed.files[name] for name in "ac"], [RATIOS[name] for name in "ac"])
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name in row for row in rows):
            module.register_forward_hook(slow.hook(name, rows))
    stand_alone(pipe, family, slow)
    monkeypatch.setattr(F, "scaled_dot_product_attention", slow.attention)
    close(found, pipe(**call, **(plain() | {"guidance_scale": none}), **own_size(pipe)).images)
