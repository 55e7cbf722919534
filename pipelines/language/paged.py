"""Forward passes of a transformers model on a packed batch, with keys and values in the pages of a pool.

The model's code is unchanged. Its attention function is replaced through transformers' public ``AttentionInterface``
by one that writes the keys and values of the new tokens into pages and attends request by request: tokens of all
requests are one row (1, T), and nothing but attention looks beyond its own token.

    decoding    one token of each of B requests: their pages gathered to (B, longest), shorter ones masked
    a prompt    n tokens of one request at once, causal, on what the request has in its pages already
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from adapters.errors import FamilyError, InputError
from adapters.serving.pool import PagePool

NAME = "studio_paged"
"""The attention function's name among transformers' implementations."""

ARGUMENT = "paged_batch"
"""The extra argument of the model's forward that reaches it."""

Table = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """What the cache of a model consists of.

    Attributes:
        layers: L, layers with attention.
        page: P = kv_heads * head_dim, numbers of one token's keys in the widest layer; narrower ones (a pruned model's)
            fill the start of their pages.
    """

    layers: int
    page: int

    @property
    def pages_per_token(self) -> int:
        return 2 * self.layers


@dataclass(frozen=True)
class Part:
    """The new tokens of one request.

    Attributes:
        ids: their numbers in the vocabulary.
        start: position of the first one.
        pages: (2 L, at least start + len(ids)), the request's pages; row 2 l has keys of layer l, row 2 l + 1 values.
    """

    ids: Sequence[int]
    start: int
    pages: Table

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


@dataclass(eq=False)
class PagedBatch:
    """The new tokens of several requests: T in all, those of one token each (B of them) first.

    Args:
        parts: in the order of the batch.
        shadow: the same parts with other pages, for a first pass over the same tokens (X-LoRA); see :meth:`first`.
    """

    parts: Sequence[Part]
    pool: PagePool
    shadow: PagedBatch | None = None
    in_first: bool = False
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.pool.pages.device
        self.decoding = next((n for n, part in enumerate(self.parts) if len(part.ids) > 1), len(self.parts))
        assert all(len(part.ids) > 1 for part in self.parts[self.decoding :]), "single tokens come first"
        written = np.concatenate([part.pages[:, part.start : part.end] for part in self.parts], axis=1)
        self.written = torch.from_numpy(written).to(device)  # (2 L, T)
        self.lengths = torch.tensor([part.end for part in self.parts[: self.decoding]], device=device)
        longest = max((part.end for part in self.parts[: self.decoding]), default=0)
        table = np.zeros((written.shape[0], self.decoding, longest), dtype=np.int64)  # page 0 beyond a request's end
        for row, part in enumerate(self.parts[: self.decoding]):
            table[:, row, : part.end] = part.pages[:, : part.end]
        self.table = torch.from_numpy(table).to(device)
        self.prompts = [
            (part, torch.from_numpy(np.ascontiguousarray(part.pages[:, : part.end])).to(device))
            for part in self.parts[self.decoding :]
        ]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Token numbers and positions, (1, T) both."""
        device = self.pool.pages.device
        ids = [token for part in self.parts for token in part.ids]
        positions = [place for part in self.parts for place in range(part.start, part.end)]
        return torch.tensor([ids], device=device), torch.tensor([positions], device=device)

    def last_rows(self) -> list[int]:
        """Row of the last token of each part."""
        ends = np.cumsum([len(part.ids) for part in self.parts])
        return [int(end) - 1 for end in ends]

    def mask(self, window: int | None) -> Tensor:
        """(B, 1, 1, longest): which keys a decoded token sees; with a window only the last ones."""
        if window not in self._masks:
            place = torch.arange(self.table.shape[2], device=self.table.device)
            seen = place < self.lengths[:, None]
            if window is not None:
                seen &= place >= self.lengths[:, None] - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, s_aux: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a packed batch; registered with transformers as :data:`NAME`.

    Args:
        query: (1, heads, T, head_dim).
        key, value: (1, kv_heads, T, head_dim) of the new tokens.

    Returns:
        (1, T, heads, head_dim).

    Raises:
        FamilyError: the layer is of a kind that is not supported.
    """
    batch: PagedBatch | None = kwargs.get(ARGUMENT)
    if batch is None:
        raise FamilyError(f"{type(module).__name__} does not hand further arguments on to its attention function.")
    batch = batch.shadow if batch.in_first and batch.shadow is not None else batch
    if s_aux is not None or key.shape != value.shape or key.shape[1] * key.shape[3] > batch.pool.page_elems:
        raise FamilyError(f"{type(module).__name__} keeps more, or others, than keys and values of one size.")
    layer, pages, heads = 2 * module.layer_idx, batch.pool.pages, query.shape[1]
    kv_heads, size = key.shape[1], key.shape[3]
    used = pages[:, : kv_heads * size]
    for row, new in ((layer, key), (layer + 1, value)):
        used.index_copy_(0, batch.written[row], new[0].transpose(0, 1).flatten(1).to(pages))
    window = sliding_window if sliding_window is not None and sliding_window > 0 else None
    scale = size**-0.5 if scaling is None else scaling
    found = query.new_empty(query.shape[2], heads, size)

    def gathered(ids: Tensor) -> Tensor:
        """(n, length) pages as (n, kv_heads, length, head_dim)."""
        return used.index_select(0, ids.flatten()).view(*ids.shape, kv_heads, size).transpose(1, 2).to(query)

    count = batch.decoding
    if count:
        q = query[0, :, :count].transpose(0, 1).reshape(count, kv_heads, -1, size)  # query heads of one key as rows
        made = _attend(q, gathered(batch.table[layer]), gathered(batch.table[layer + 1]), batch.mask(window), scale,
                       softcap)  # fmt: skip
        found[:count] = made.reshape(count, heads, size)
    row = count
    for part, table in batch.prompts:
        n = len(part.ids)
        q = query[:, :, row : row + n].reshape(1, kv_heads, -1, size)  # heads of one key as rows
        seen = _causal(n, part.end, window, query.device).repeat(heads // kv_heads, 1)
        made = _attend(q, gathered(table[layer][None]), gathered(table[layer + 1][None]), seen, scale, softcap)
        found[row : row + n] = made.view(heads, n, size).transpose(0, 1)
        row += n
    return found[None], None


def _causal(n: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """(n, total): the last n of ``total`` tokens see themselves and earlier ones, with a window only the last ones."""
    place = torch.arange(total, device=device)
    own = place[total - n :, None]
    seen = place <= own
    return seen if window is None else seen & (place > own - window)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, torch.float32).to(v) @ v


def _no_mask(*_: Any, **__: Any) -> None:
    """Which keys a token sees is known from the pages."""


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)


def shape_of(model: Any) -> Shape:
    """What one token of ``model`` keeps.

    Raises:
        FamilyError: it has layers without attention, or of different sizes.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise FamilyError(f"This {config.model_type} model has layers of the kind {sorted(other)[0]}, which keep no "
                          "keys and values: it cannot be served.")  # fmt: skip
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(config.num_hidden_layers, kv_heads * size)


class PagedModel:
    """A causal language model that computes on pages.

    Args:
        model: frozen, in evaluation mode; its attention implementation is changed until :meth:`close`.

    Raises:
        FamilyError: it does not compute the same on pages as by itself (checked on a few tokens).
    """

    def __init__(self, model: Any, pool: PagePool) -> None:
        self.model, self.pool = model, pool
        self.shape = shape_of(model)
        self._before = model.config._attn_implementation
        try:
            self._check()
        except FamilyError as error:
            self.close()
            raise FamilyError(f"This {model.config.model_type} model cannot be served: {error}") from None
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self._before)

    @torch.no_grad()
    def forward(self, batch: PagedBatch, rows: Sequence[int]) -> Tensor:
        """Logits (len(rows), vocabulary) in fp32 of these rows of the batch."""
        ids, positions = batch.inputs()
        keep = torch.tensor(list(rows), device=ids.device)
        found = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, **{ARGUMENT: batch}
        )
        logits: Tensor = found.logits[0]
        return logits.float()

    def _check(self) -> None:
        """Six tokens in two pieces and one more, beside another request, against the model's own forward pass."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        first, second = ([(7 * step * (n + 3) + n) % vocabulary for n in range(7)] for step in (1, 2))
        ids = torch.tensor([first, second], device=self.pool.pages.device)
        with torch.no_grad():
            wanted = self.model(input_ids=ids, use_cache=False).logits[:, -1].float()
        try:
            self.model.set_attn_implementation(NAME)
        except (ValueError, AttributeError) as error:
            raise FamilyError(f"its attention cannot be exchanged ({error}).") from None
        per_token, owner = self.shape.pages_per_token, ("kv", "check")
        held = self.pool.alloc(14 * per_token, owner)
        if held is None:
            raise InputError(f"The pool has {self.pool.total} pages, too few for two requests of seven tokens.")
        pages = held.reshape(2, per_token, 7)
        try:
            self.forward(PagedBatch([Part(first[:4], 0, pages[0]), Part(second[:6], 0, pages[1])], self.pool), [0])
            self.forward(PagedBatch([Part(first[4:6], 4, pages[0])], self.pool), [0])
            parts = [Part(first[6:], 6, pages[0]), Part(second[6:], 6, pages[1])]
            found = self.forward(PagedBatch(parts, self.pool), [0, 1])
        except TypeError as error:
            raise FamilyError(f"its forward pass takes no further arguments ({error}).") from None
        finally:
            self.pool.free(owner)
        bound = 1e-3 if found.dtype == self.pool.pages.dtype else 5e-2
        distance = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not distance < bound:
            raise FamilyError(
                f"with its cache in pages its result differs by {distance:.1e} from its own: its attention does more "
                "than look at earlier tokens."
            )
