"""Regions inside SD3 and Flux: one pass over picture cells and the concatenated texts of all regions.

The text sequence is  [background | region 1 | region 2 | ...];  the picture's cells come after it (Flux) or before it
(SD3). With token gates an adapter acts on its segment of the text with its row's strengths and on picture cells with
the regions' shares. Attention:

    picture cell  -> picture cells                                  all (or, with self_mask, not those of other regions)
    picture cell  -> text segment i      if the cell is in region i (background: in no region)
    text segment  -> itself, and the picture cells of its region

The pooled text vector, and layers that only read it or the time, have no place: the vector is the background prompt's,
and adapters act there at their mean share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from adapters.layers.gated import GatedAdapters
from pipelines.diffusion.families import Encoding
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.regions.masks import Level, Place, level

TEXT_LAYERS = (
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "context_embedder", "ff_context", "norm1_context",
)  # fmt: skip
"""Module names on the text side of a joint block."""


def joined(encodings: Sequence[Encoding]) -> Encoding:
    """One encoding with the texts of all rows concatenated; pooled vectors are the first one's."""

    def cat(half: str) -> dict[str, Tensor] | None:
        parts = [getattr(encoding, half) for encoding in encodings]
        if parts[0] is None:
            return None
        return {**parts[0], "embeds": torch.cat([part["embeds"] for part in parts], 1)}

    positive = cat("positive")
    assert positive is not None
    return Encoding(positive, cat("negative"))


class TextAttention:
    """The attention of picture cells to the text, averaged over layers and steps:

        M(cell, token) = mean over layers, heads and passes of softmax over the text's tokens (Q K^T / sqrt d)

    Args:
        every: passes of the transformer per step, of which the first is used.
    """

    def __init__(self, every: int) -> None:
        self.every, self.reading = every, True
        self._total: Tensor | None = None
        self._count = 0

    def add(self, query: Tensor, key: Tensor) -> None:
        """Add queries of the cells and keys of the text (batch, heads, tokens, width), of the batch's last sample."""
        if not self.reading:
            return
        scores = query[-1].float() @ key[-1].float().transpose(-1, -2) / query.shape[-1] ** 0.5
        found = scores.softmax(-1).mean(0)
        self._total = found if self._total is None else self._total + found
        self._count += 1

    def maps(self) -> Tensor:
        """M (cells, tokens)."""
        assert self._total is not None
        return self._total / self._count


class RegionalTransformer:
    """One run with regions inside a joint transformer.

    Args:
        denoiser: SD3's or Flux's transformer.
        engine: the adapters joined for it.
        steps: the rows of strengths at every step.
        places: the regions' places.
        grid: height and width of the grid of picture tokens.
        segment: number of tokens of one row's text.
        self_mask: regions do not attend to each other.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        engine: GatedAdapters,
        steps: Sequence[Step],
        places: Sequence[Place],
        grid: tuple[int, int],
        segment: int,
        self_mask: bool,
    ) -> None:
        self.engine, self.steps, self.segment, self.self_mask = engine, steps, segment, self_mask
        self.flux = type(denoiser).__name__.startswith("Flux")
        self.device = next(denoiser.parameters()).device
        self.level = level(places, *grid, hard=False, device=self.device)
        self.hard = level(places, *grid, hard=True, device=self.device)
        self.allowed = attention_mask(self.hard, segment, self_mask, text_first=self.flux)
        self.capture: TextAttention | None = None
        self.step = 0
        self.calls = 0
        self._set: tuple[tuple[float, ...], ...] | None = None
        self._gates: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[RegionalTransformer]:
        """Inside, regions act on ``denoiser``; its processors and hooks are restored on exit."""
        with ExitStack() as stack:
            stack.enter_context(self.engine.attached())
            self.device = next(denoiser.parameters()).device
            for module in denoiser.modules():
                if hasattr(module, "processor") and hasattr(module, "set_processor"):
                    attention: Any = module
                    own = attention.processor
                    stack.callback(attention.set_processor, own)
                    attention.set_processor(_masked(own, self))
            before = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            yield self

    def gates_of(self, name: str, tokens: int) -> Tensor:
        """The engine's token gates (L, N), or (1, N) for layers without a place."""
        cells, texts = self.level.tokens, self.segment * len(self.level.shares)
        if tokens == 0:
            kind = "none"
        elif any(part in TEXT_LAYERS for part in name.split(".")):
            kind = "text"
        elif tokens == cells + texts and name.startswith("single_transformer_blocks."):
            kind = "both"
        else:
            kind = "cells"
        if (kind, tokens) not in self._gates:
            self._gates[kind, tokens] = self._made(kind)
        return self._gates[kind, tokens]

    def _made(self, kind: str) -> Tensor:
        if kind == "none":
            return self.level.shares.mean(1)[None] @ self.rows
        cells = self.level.shares.T @ self.rows
        text = self.rows.repeat_interleave(self.segment, 0)
        return {"cells": cells, "text": text, "both": torch.cat([text, cells])}[kind]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.capture is not None:
            self.capture.reading = self.calls % self.capture.every == 0
        self.calls += 1
        rows = self.steps[min(self.step, len(self.steps) - 1)].rows
        if rows == self._set:
            return
        gates = self.engine.gates
        self._set, self.rows = rows, torch.tensor(rows, device=self.device, dtype=torch.float32)
        self._gates.clear()
        gates.joint([1.0 if any(row[i] for row in rows) else 0.0 for i in range(len(rows[0]))])
        gates.tokens_to(self.gates_of)


def attention_mask(here: Level, segment: int, self_mask: bool, text_first: bool) -> Tensor:
    """Which token may attend to which (tokens, tokens), in the order of the sequence."""
    shares = here.shares > 0
    rows, cells = shares.shape
    texts = torch.arange(rows, device=shares.device).repeat_interleave(segment)
    text_text = texts[:, None] == texts[None, :]
    cell_text = shares.T[:, texts]
    among = here.allowed if self_mask else None
    cell_cell = torch.ones(cells, cells, dtype=torch.bool, device=shares.device) if among is None else among
    if text_first:
        return torch.cat([torch.cat([text_text, cell_text.T], 1), torch.cat([cell_text, cell_cell], 1)])
    return torch.cat([torch.cat([cell_cell, cell_text], 1), torch.cat([cell_text.T, text_text], 1)])


def _masked(own: Any, run: RegionalTransformer) -> Any:
    return FluxMasked(own, run) if run.flux else JointMasked(run)


class FluxMasked:
    """Flux's own processor with the mask."""

    def __init__(self, own: Any, run: RegionalTransformer) -> None:
        self.own, self.run = own, run

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **ignored: Any,
    ) -> Any:
        if self.run.capture is not None and encoder_hidden_states is not None:
            self.run.capture.add(*self._looking(attn, hidden_states, encoder_hidden_states, image_rotary_emb))
        return self.own(attn, hidden_states, encoder_hidden_states, self.run.allowed[None, None], image_rotary_emb)

    @staticmethod
    def _looking(attn: Any, cells: Tensor, text: Tensor, rotations: Any) -> tuple[Tensor, Tensor]:
        """Queries of the cells and keys of the text (batch, heads, tokens, width), as in the attention."""
        made = []
        length = text.shape[1]
        sides = (
            (attn.to_q, attn.norm_q, cells, slice(length, None)),
            (attn.add_k_proj, attn.norm_added_k, text, slice(length)),
        )
        for layer, norm, states, part in sides:
            tensor = norm(layer(states).unflatten(-1, (-1, attn.head_dim)))
            turned: Any = apply_rotary_emb(tensor, tuple(table[part] for table in rotations), sequence_dim=1)
            made.append(turned.transpose(1, 2))
        return made[0], made[1]


class JointMasked:
    """SD3's joint attention with a mask (its own processor takes none)."""

    def __init__(self, run: RegionalTransformer) -> None:
        self.run = run

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **ignored: Any
    ) -> Any:
        cells = hidden_states.shape[1]
        parts = [self._projected(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
        allowed: Tensor | None = self.run.allowed
        if encoder_hidden_states is None:  # SD3.5's second attention: picture cells alone
            allowed = self.run.allowed[:cells, :cells] if self.run.self_mask else None
        else:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            parts.append(self._projected(attn, encoder_hidden_states, *names))
            if self.run.capture is not None:
                self.run.capture.add(parts[0][0], parts[1][1])
        query, key, value = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        found = found.transpose(1, 2).flatten(2).to(query.dtype)
        picture = attn.to_out[1](attn.to_out[0](found[:, :cells]))
        if encoder_hidden_states is None:
            return picture
        text = found[:, cells:]
        return picture, text if attn.context_pre_only else attn.to_add_out(text)

    def _projected(self, attn: Any, states: Tensor, names: tuple[str, ...], norms: tuple[str, str]) -> list[Tensor]:
        """Query, key and value (batch, heads, tokens, width)."""
        made = [getattr(attn, name)(states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in names]
        for k, norm in enumerate(norms):
            if getattr(attn, norm, None) is not None:
                made[k] = getattr(attn, norm)(made[k])
        return made
