"""Regions inside a UNet: one pass, each region with its own text and its own adapters.

Cross-attention (LoRA-Composer, arXiv 2403.11627, region-aware injection): the cells of each region attend to the keys
and values of that region's prompt, computed with its own adapters, and go through its own to_out; then the outputs are
put back on the grid with the regions' shares. Keys and values depend only on the prompt and the adapters' strengths, so
those of all layers are computed once and kept until a strength changes. All groups of cells are padded to one length
and processed in one call, for any number of regions.

Self-attention (with ``self_mask``): cells of different regions do not attend to each other (concept isolation).

Other layers (scope "spatial"): the engine's token gates, share_i(cell) times the strength. The time vector that a
residual block adds to all cells is computed once per region and added with the shares. Layers without a place get the
mean share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.layers.gated import GatedAdapters, GatedLayer
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.regions.masks import Level, Place, grids, level

if TYPE_CHECKING:
    from pipelines.diffusion.regions.capture import Capture

PLAIN = ("AttnProcessor2_0", "AttnProcessor", "XFormersAttnProcessor")
"""Attention processors that compute ordinary attention; others cannot be replaced."""


@dataclass(frozen=True)
class RowText:
    """The text of a row: embeddings (layers | 1, tokens, width), one per cross-attention layer or one for all."""

    positive: Tensor
    negative: Tensor | None

    def of(self, layer: int, half: str) -> Tensor:
        """The embeddings (tokens, width) of cross-attention layer number ``layer``."""
        tensor = self.positive if half == "positive" else self.negative
        assert tensor is not None
        return tensor[layer if len(tensor) > 1 else 0]


def ordered_blocks(unet: nn.Module) -> dict[str, BasicTransformerBlock]:
    """Path -> transformer block with cross-attention, in the order of the forward pass: down, middle, up."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock) and getattr(module, "attn2", None) is not None
    }
    order = ("down_blocks", "mid_block", "up_blocks")
    return {name: found[name] for part in order for name in found if name.startswith(f"{part}.")}


def check_attention(unet: nn.Module) -> None:
    """Raise :class:`InputError` for attention slicing or a processor of another kind (IP-Adapter, PAG, ...)."""
    for block in ordered_blocks(unet).values():
        for attention in (block.attn1, block.attn2):
            kind = type(attention.processor).__name__
            if kind not in PLAIN:
                raise InputError(
                    f"Regions replace the model's attention during a call, which is not possible with '{kind}': "
                    "switch attention slicing and attention adapters off."
                )


class RegionalUNet:
    """One run with regions inside a UNet.

    Args:
        unet: the denoiser.
        engine: the adapters joined for it (with the scope already applied).
        steps: the rows of strengths at every step.
        texts: the text of each row, the background first.
        places: the regions' places.
        hard: masks are hard.
        self_mask: regions do not attend to each other.
        guided: the batch is the negative half, then the positive one.
    """

    def __init__(
        self,
        unet: nn.Module,
        engine: GatedAdapters,
        steps: Sequence[Step],
        texts: Sequence[RowText],
        places: Sequence[Place],
        hard: bool,
        self_mask: bool,
        guided: bool,
    ) -> None:
        self.unet, self.engine, self.steps, self.texts, self.places = unet, engine, steps, texts, places
        self.hard, self.self_mask, self.guided = hard, self_mask, guided
        self.blocks = ordered_blocks(unet)
        self.step = 0
        self.calls = 0
        self.halves: tuple[str, ...] = ("negative", "positive") if guided else ("positive",)
        self.capture: Capture | None = None
        self.rows: Tensor | None = None
        self._grid = (0, 0)
        self._levels: dict[int, Level] = {}
        self._kept_levels: dict[tuple[int, int], dict[int, Level]] = {}
        self._text: dict[str, tuple[Tensor, Tensor]] = {}
        self._ready: dict[tuple[str, int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}
        self._gates: dict[tuple[str, int], Tensor] = {}
        self._outs = {f"{name}.attn2.to_out.0" for name in self.blocks}
        self._texts = {f"{name}.attn2.{part}" for name in self.blocks for part in ("to_k", "to_v")}
        self._slots: Level | None = None
        self._set: tuple[tuple[float, ...], ...] | None = None

    # Used by the layers

    def level(self, tokens: int) -> Level:
        """The regions on the grid with this many cells."""
        return self._levels[tokens]

    def gates_of(self, name: str, tokens: int) -> Tensor | None:
        """The engine's token gates (L, N), or (1, N) for layers without a place."""
        if name in self._outs:
            slots = self._slots
            assert slots is not None
            return self._gate("slots", slots.tokens, lambda rows: rows[slots.slot_rows])
        if tokens == 0:
            finest = self.level(self._grid[0] * self._grid[1])
            return self._gate("none", 0, lambda rows: finest.shares.mean(1)[None] @ rows)
        return self._gate("image", tokens, lambda rows: self.level(tokens).shares.T @ rows)

    def keys_values(self, name: str, batch: int, which: Level) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for every sample and group: (batch * groups, heads, tokens, head width)."""
        key = (name, batch, self.halves)
        if key not in self._ready:
            attention = self.blocks[name].attn2
            chosen = [0 if half == "negative" and self.guided else -1 for half in self.halves]
            made = []
            for tensor in self._text[name]:  # (halves, rows, tokens, width)
                picked = tensor[chosen][:, list(which.rows)]
                picked = picked.repeat_interleave(batch // len(self.halves), 0).flatten(0, 1)
                made.append(in_heads(picked, attention.heads).contiguous())
            self._ready[key] = made[0], made[1]
        return self._ready[key]

    def text_keys(self, name: str, row: int) -> Tensor:
        """The keys of a row's positive prompt at a layer: (heads, tokens, head width)."""
        return in_heads(self._text[name][0][-1, row][None], self.blocks[name].attn2.heads)[0]

    # A run

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[RegionalUNet]:
        """Inside, regions act on ``denoiser``; its processors and hooks are restored on exit."""
        check_attention(denoiser)
        with ExitStack() as stack:
            placed = self._placed_times(denoiser)
            stack.enter_context(self.engine.attached(without=[layer.name for layer in placed.values()]))
            for name, block in self.blocks.items():
                stack.enter_context(_processor(block.attn2, CrossAttention(self, name)))
                stack.enter_context(_processor(block.attn1, SelfAttention(self, name)))
            for resnet, layer in placed.items():
                for handle in _place_time(self, resnet, layer):
                    stack.callback(handle.remove)
            before = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            try:
                yield self
            finally:
                self._text.clear()
                self._ready.clear()
                self._gates.clear()
                self._levels.clear()

    def prepare(self, sample: Tensor) -> None:
        """Prepare a forward pass on ``sample`` (batch, channels, height, width) at the current step."""
        size = (int(sample.shape[2]), int(sample.shape[3]))
        if size != self._grid:
            self._grid = size
            self._levels = {}
            for height, width in grids(*size):
                self._levels.setdefault(height * width, level(self.places, height, width, self.hard, sample.device))
            self._set = None
        rows = self.steps[min(self.step, len(self.steps) - 1)].rows
        if rows != self._set:
            self._set_rows(rows, sample)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.prepare(args[0] if args else kwargs["sample"])

    def _set_rows(self, rows: tuple[tuple[float, ...], ...], sample: Tensor) -> None:
        """Set new strengths: compute the keys and values of every layer and row, then set the token gates."""
        gates = self.engine.gates
        gates.tokens_to(None)
        self._ready.clear()
        self._gates.clear()
        halves = ("negative", "positive") if self.guided else ("positive",)
        made: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.blocks}
        with torch.no_grad():
            for row, text in zip(rows, self.texts, strict=True):
                gates.joint(row) if row else gates.off()
                for number, (name, block) in enumerate(self.blocks.items()):
                    given = torch.stack([text.of(number, half) for half in halves]).to(sample)
                    made[name].append((block.attn2.to_k(given), block.attn2.to_v(given)))
        self._text = {
            name: (torch.stack([pair[0] for pair in pairs], 1), torch.stack([pair[1] for pair in pairs], 1))
            for name, pairs in made.items()
        }
        self.rows = torch.tensor(rows, device=sample.device, dtype=torch.float32)
        used = [1.0 if any(row[i] for row in rows) else 0.0 for i in range(len(rows[0]))]
        gates.joint(used)
        gates.tokens_to(self.gates_of)
        self._set = rows

    def _gate(self, kind: str, tokens: int, make: Any) -> Tensor:
        key = (kind, tokens)
        if key not in self._gates:
            self._gates[key] = make(self.rows)
        return self._gates[key]

    def _placed_times(self, unet: nn.Module) -> dict[ResnetBlock2D, GatedLayer]:
        """Residual blocks whose time projection is adapted (if it is added, and without DoRA)."""
        layers = {layer.name: layer for layer in self.engine.layers if layer.rows is None}
        return {
            module: layers[f"{name}.time_emb_proj"]
            for name, module in unet.named_modules()
            if isinstance(module, ResnetBlock2D)
            and module.time_embedding_norm == "default"
            and f"{name}.time_emb_proj" in layers
        }


class StandIn:
    """Replaces the processor of the attention called ``name`` during a run."""

    def __init__(self, run: RegionalUNet, name: str) -> None:
        self.run, self.name = run, name


class CrossAttention(StandIn):
    """Cross-attention in which every group of cells attends to its own text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        run, (batch, tokens, _) = self.run, hidden_states.shape
        here = run.level(tokens)
        query = attn.to_q(hidden_states)
        if run.capture is not None:
            run.capture.cross(self.name, attn, query)
        groups, length = len(here.rows), here.slots
        whole = groups == 1
        slots = query if whole else query[:, here.index]
        slots = slots.view(batch * groups, length, attn.heads, -1).transpose(1, 2)
        keys, values = run.keys_values(self.name, batch, here)
        found = F.scaled_dot_product_attention(slots, keys.to(slots), values.to(slots), scale=attn.scale)
        found = found.transpose(1, 2).reshape(batch, groups * length, -1)
        run._slots = here
        found = attn.to_out[1](attn.to_out[0](found))
        if not whole:
            found = _gathered(found, here)
        if attn.residual_connection:
            found = found + hidden_states
        scaled: Tensor = found / attn.rescale_output_factor
        return scaled


class SelfAttention(StandIn):
    """Self-attention; with ``self_mask`` cells of different regions do not attend to each other."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        run, (batch, tokens, _) = self.run, hidden_states.shape
        query, key, value = (in_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
        allowed = run.level(tokens).allowed if run.self_mask else None
        if run.capture is not None:
            run.capture.self_(self.name, attn, query, key, allowed)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=attn.scale)
        found = attn.to_out[1](attn.to_out[0](found.transpose(1, 2).reshape(batch, tokens, -1)))
        if attn.residual_connection:
            found = found + hidden_states
        scaled: Tensor = found / attn.rescale_output_factor
        return scaled


def in_heads(tensor: Tensor, heads: int) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    return tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2)


def _gathered(slots: Tensor, here: Level) -> Tensor:
    """Slots (batch, G n, width) back on the grid (batch, L, width)."""
    if len(here.gather) == 1:
        return slots[:, here.gather[0]]
    weights = here.weights.to(slots)[..., None]
    found = weights[0] * slots[:, here.gather[0]]
    for index, weight in zip(here.gather[1:], weights[1:], strict=True):
        found = found + weight * slots[:, index]
    return found


@contextmanager
def _processor(attention: Any, stand_in: Any) -> Iterator[None]:
    own = attention.processor
    attention.set_processor(stand_in)
    try:
        yield
    finally:
        attention.set_processor(own)


def _place_time(run: RegionalUNet, resnet: ResnetBlock2D, layer: GatedLayer) -> list[Any]:
    """Hooks that add the adapters' part of a residual block's time vector per cell, just before its second norm."""
    waiting: list[Tensor] = []

    def made(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert run.rows is not None
        waiting[:] = [layer.delta_rows(args[0], run.rows)]  # (batch, rows, channels)

    def met(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cells: Tensor = args[0]
        here = run.level(cells.shape[2] * cells.shape[3])
        added = (waiting.pop().transpose(1, 2) @ here.shares.to(cells)).view(*cells.shape)
        return cells + added, *args[1:]

    return [resnet.time_emb_proj.register_forward_hook(made), resnet.norm2.register_forward_pre_hook(met)]
