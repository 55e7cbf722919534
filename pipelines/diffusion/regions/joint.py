"""Regions inside transformers: one pass over picture cells and the concatenated texts of all regions.

The text sequence is  [background | region 1 | region 2 | ...];  the picture's cells come after it (Flux) or before it
(SD3). With token gates an adapter acts on its segment of the text with its row's strengths and on picture cells with
the regions' shares. Attention:

    picture cell  -> picture cells                                  all (or, with self_mask, not those of other regions)
    picture cell  -> text segment i      if the cell is in region i (background: in no region)
    text segment  -> itself, and the picture cells of its region

A video's cells are those of a picture in every frame: a region is at the same place in all of them.

Tokens of reference pictures and padding belong to the background and see all cells. The pooled text vector, and layers
that only read it or the time, have no place: the vector is the background prompt's, and adapters act there at their
mean share.

The mask is added to torch's ``scaled_dot_product_attention`` while an attention module runs, so it does not depend on
the processors of a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapters.errors import InputError
from adapters.layers.gated import GatedAdapters
from pipelines.diffusion.families.base import Joined, Layout
from pipelines.diffusion.methods.step import Step
from pipelines.diffusion.regions.masks import Level, Place, level

TEXT, CELL, OTHER, LEAD = range(4)
"""Kinds of tokens: of a row's text, of the picture, of neither, and put before a row's text by the denoiser."""


class TextAttention:
    """The attention of picture cells to the text, averaged over layers and steps:

        M(cell, token) = mean over layers, heads and passes of softmax over the text's tokens (Q K^T / sqrt d)

    Args:
        sample: the sample of the batch that is used.

    Attributes:
        reading: whether it takes part in this pass; of several in a step the first is the prompt's.
    """

    def __init__(self, sample: int = -1) -> None:
        self.sample, self.reading = sample, True
        self._total: Tensor | None = None
        self._count = 0

    def add(self, query: Tensor, key: Tensor) -> None:
        """Add queries of the cells and keys of the text (batch, heads, tokens, width)."""
        if not self.reading:
            return
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # several queries may share a key
        scores = query[self.sample].float() @ key[self.sample].float().transpose(-1, -2) / query.shape[-1] ** 0.5
        found = scores.softmax(-1).mean(0)
        self._total = found if self._total is None else self._total + found
        self._count += 1

    def maps(self) -> Tensor:
        """M (cells, tokens)."""
        assert self._total is not None
        return self._total / self._count


class Tokens:
    """The sequences of tokens inside a transformer, the rows they belong to, and who may attend to whom.

    Args:
        layout: the order of tokens.
        cells: the regions on the grid of picture tokens, with soft borders.
        hard: the same with hard borders.
        texts: number of tokens of each row's text.
        references: number of tokens of reference pictures.
        self_mask: regions do not attend to each other.
        frames: of a video, whose tokens come frame by frame.

    Attributes:
        kinds: sequence -> kind of each token. Sequences are "text", "image" (with references), "joint" and "prompt"
            (the text before the denoiser puts its own tokens before it).
        shares: sequence -> share of each token in each row (tokens, rows).
    """

    def __init__(
        self,
        layout: Layout,
        cells: Level,
        hard: Level,
        texts: Sequence[int],
        references: int,
        self_mask: bool,
        frames: int = 1,
    ) -> None:
        rows, device = len(cells.shares), cells.shares.device
        self.among = hard.allowed.repeat(frames, frames) if self_mask and hard.allowed is not None else None

        def padded(shares: Tensor, kind: int, more: int) -> tuple[Tensor, Tensor]:
            """Shares (tokens, rows) and kinds with ``more`` tokens of the background, and padding, at the end."""
            rest = more + -(len(shares) + more) % layout.multiple
            background = torch.zeros(rest, rows, device=device)
            background[:, 0] = 1
            kinds = torch.tensor([kind] * len(shares) + [OTHER] * rest, device=device)
            return torch.cat([shares, background]), kinds

        def text_of(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
            of_text = torch.arange(rows, device=device).repeat_interleave(torch.tensor(lengths, device=device))
            return padded(F.one_hot(of_text, rows).float(), TEXT, 0)

        text, text_kinds = text_of([layout.leading + length for length in texts])
        begin = 0
        for length in texts if layout.leading else ():
            text_kinds[begin : begin + layout.leading] = LEAD
            begin += layout.leading + length
        image, image_kinds = padded(cells.shares.T.repeat(frames, 1), CELL, references)
        members, _ = padded((hard.shares.T > 0).float().repeat(frames, 1), CELL, references)
        order = ("text", "image") if layout.text_first else ("image", "text")
        self.kinds = {"text": text_kinds, "image": image_kinds}
        self.shares = {"text": text, "image": image}
        self._members = {"text": text, "image": members}
        if layout.leading:
            self.shares["prompt"], self.kinds["prompt"] = self._members["prompt"], _ = text_of(texts)
        for table in (self.kinds, self.shares, self._members):
            table["joint"] = torch.cat([table[part] for part in order])
        self.lengths = {name: len(kinds) for name, kinds in self.kinds.items()}
        self._allowed: dict[tuple[str, str], Tensor | None] = {}

    def sequence(self, tokens: int, of_text: bool) -> str | None:
        """The sequence of so many tokens; ``of_text`` decides between a text and a picture of equal length."""
        names = [name for name, length in self.lengths.items() if length == tokens]
        order = ("text", "prompt", "image", "joint") if of_text else ("image", "text", "joint", "prompt")
        return next((name for name in order if name in names), None)

    def allowed(self, queries: str, keys: str) -> Tensor | None:
        """Which token of one sequence may attend to which of another (queries, keys); None if all may."""
        if (queries, keys) not in self._allowed:
            self._allowed[queries, keys] = self._made(queries, keys)
        return self._allowed[queries, keys]

    def part(self, name: str, kind: int) -> Tensor:
        """Positions of the tokens of a kind in a sequence."""
        return (self.kinds[name] == kind).nonzero().flatten()

    def _made(self, queries: str, keys: str) -> Tensor | None:
        asking, asked = self.kinds[queries][:, None], self.kinds[keys][None, :]
        together = (self._members[queries] @ self._members[keys].T) > 0
        of_text = [(kinds == TEXT) | (kinds == LEAD) for kinds in (asking, asked)]
        restricted = of_text[1] | (of_text[0] & (asked == CELL))
        allowed = together | ~restricted
        if self.among is not None:
            here, there = self.part(queries, CELL), self.part(keys, CELL)
            if len(here) and len(there):
                allowed[here[:, None], there[None, :]] = self.among
        return None if bool(allowed.all()) else allowed


class RegionalTransformer:
    """One run with regions inside a transformer.

    Args:
        denoiser: the transformer.
        engine: the adapters joined for it.
        steps: the rows of strengths at every step.
        places: the regions' places.
        grid: height and width of the grid of picture tokens.
        texts: number of tokens of each row's text.
        layout: the order of tokens.
        self_mask: regions do not attend to each other.
        hidden: text tokens that exist only in the other half of guidance: (samples of both halves, tokens); or None.

    Attributes:
        step: number of the step.
        half: number of the pass in this step; of a denoiser that is called for each half of guidance, 0 = the prompt.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        engine: GatedAdapters,
        steps: Sequence[Step],
        places: Sequence[Place],
        grid: tuple[int, int],
        texts: Sequence[int],
        layout: Layout,
        self_mask: bool,
        hidden: Tensor | None = None,
    ) -> None:
        self.engine, self.steps, self.texts, self.layout, self.self_mask = engine, steps, texts, layout, self_mask
        self.hidden = hidden
        self.device = next(denoiser.parameters()).device
        self.level = level(places, *grid, hard=False, device=self.device)
        self.hard = level(places, *grid, hard=True, device=self.device)
        self.capture: TextAttention | None = None
        self.step = 0
        self.half = 0
        self._step = -1
        self._second: dict[str, bool] = {}
        self.masked = 0
        self._reading: set[str] = set()
        self._tokens: Tokens | None = None
        self._set: tuple[tuple[float, ...], ...] | None = None
        self._gates: dict[str | None, Tensor] = {}

    @property
    def seen(self) -> list[bool]:
        """For every row, whether a cell sees its text."""
        return [bool(row.any()) for row in self.hard.shares]

    @property
    def tokens(self) -> Tokens:
        """The sequences of tokens, known from the first pass on."""
        assert self._tokens is not None
        return self._tokens

    @contextmanager
    def attached(self, *denoisers: nn.Module) -> Iterator[RegionalTransformer]:
        """Inside, regions act on the denoisers, of which the pipeline calls one at each step; their hooks and attention
        backend are restored on exit."""
        with ExitStack() as stack:
            stack.enter_context(self.engine.attached())
            stack.enter_context(attention_backend("native"))  # others take no mask, or ignore it
            for denoiser in denoisers:
                self._attach(denoiser, stack)
            yield self

    def _attach(self, denoiser: nn.Module, stack: ExitStack) -> None:
        self.device = next(denoiser.parameters()).device
        modules = {name: module for name, module in denoiser.named_modules() if hasattr(module, "processor")}
        two_streams = {name for name, module in modules.items() if getattr(module, "add_k_proj", None) is not None}
        self._reading = two_streams or set(modules)
        for name, module in denoiser.named_modules() if self.layout.twice else ():
            if re.search(self.layout.twice, name):
                turn = module.register_forward_pre_hook(lambda *_, name=name: self._turned(name))
                stack.callback(turn.remove)
        for name, module in modules.items():
            stack.enter_context(native(module))
            stack.enter_context(entering(module, lambda name=name: _Masking(self, name)))  # type: ignore[misc]
        before = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        stack.callback(before.remove)
        after = denoiser.register_forward_hook(self._after)
        stack.callback(after.remove)

    def gates_of(self, name: str, tokens: int) -> Tensor:
        """The engine's token gates (tokens, N), or (1, N) for layers without a place."""
        sequence = self.tokens.sequence(tokens, self.of_text(name)) if tokens else None
        if sequence not in self._gates:
            shares = self.level.shares.mean(1)[None] if sequence is None else self.tokens.shares[sequence]
            self._gates[sequence] = shares @ self.rows
        return self._gates[sequence]

    def of_text(self, name: str) -> bool:
        """Whether a module is on the text's side, by its name and, where it is called for both, by its turn."""
        if re.search(self.layout.text_layers, name) is not None:
            return True
        return any(second and name.startswith(f"{part}.") for part, second in self._second.items())

    def _turned(self, name: str) -> None:
        """A module that is called for the image, then for the text, is called."""
        self._second[name] = not self._second.get(name, True)

    def attend(self, name: str, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of an attention module called with query and key (batch, heads, tokens, width)."""
        tokens, of_text = self.tokens, self.of_text(name)
        queries, keys = (tokens.sequence(states.shape[-2], of_text) for states in (query, key))
        if self.layout.across and queries == "image" and key.shape[-2] == tokens.lengths["text"]:
            keys = "text" if re.search(self.layout.across, name) else keys
        if queries is None or keys is None:
            return mask
        self.masked += 1
        if self.capture is not None and name in self._reading and queries != "text" and keys != "image":
            self.capture.add(query[..., tokens.part(queries, CELL), :], key[..., tokens.part(keys, TEXT), :])
        allowed = tokens.allowed(queries, keys)
        if self.hidden is not None and keys != "image":
            allowed = self._visible(query.shape[0], queries, keys, allowed)
        if allowed is None:
            return mask
        if mask is None:
            return allowed if allowed.ndim == 4 else allowed[None, None]
        return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))

    def _visible(self, batch: int, queries: str, keys: str, allowed: Tensor | None) -> Tensor:
        """The mask (batch, 1, queries, keys) without hidden tokens, which only see themselves."""
        assert self.hidden is not None
        begin = self.half * batch if len(self.hidden) > batch else 0  # halves in separate passes
        tokens, hidden = self.tokens, self.hidden[begin : begin + batch].to(self.device)
        seen = torch.ones(batch, tokens.lengths[keys], dtype=torch.bool, device=self.device)
        seen[:, tokens.part(keys, TEXT)] = ~hidden
        made = seen[:, None, None, :]
        made = made if allowed is None else made & allowed
        if queries != keys:
            return made
        return made | torch.eye(tokens.lengths[keys], dtype=torch.bool, device=self.device)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._tokens is None:
            states = args[0] if args else kwargs["hidden_states"]
            # of reference pictures, which follow the picture's cells in a packed sequence
            references = max(0, int(states.shape[1]) - self.level.tokens) if self.layout.packed else 0
            # a video is (batch, channels, frames, height, width); some pictures are lists, a tensor per sample
            frames = int(states.shape[2]) if isinstance(states, Tensor) and states.ndim == 5 else 1
            self._tokens = Tokens(self.layout, self.level, self.hard, self.texts, references, self.self_mask, frames)
        self.half, self._step = (0 if self._step != self.step else self.half + 1), self.step
        self._second.clear()
        if self.capture is not None:
            self.capture.reading = self.half == 0
        rows = self.steps[min(self.step, len(self.steps) - 1)].rows
        if rows == self._set:
            return
        gates = self.engine.gates
        self._set, self.rows = rows, torch.tensor(rows, device=self.device, dtype=torch.float32)
        self._gates.clear()
        gates.joint([1.0 if any(row[i] for row in rows) else 0.0 for i in range(len(rows[0]))])
        front = self.layout.in_front
        gates.tokens_to(self.gates_of, lambda name: bool(front) and re.search(front, name) is not None)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.masked:
            raise InputError(
                f"Regions have no effect inside a {type(module).__name__} with this attention: use method 'output'."
            )


def hidden_texts(joined: Joined, images: int, positive_first: bool, multiple: int) -> Tensor | None:
    """Which text tokens (samples, tokens) only the other half of a batch has; None if there are none.

    Args:
        multiple: texts are padded to a multiple of so many tokens, which the denoiser sees.
    """
    if not joined.own:
        return None
    rows = []
    for own in joined.own if positive_first else reversed(joined.own):
        padded = [length + -length % multiple for length in own]
        tokens = [k >= length for length, most in zip(padded, joined.texts, strict=True) for k in range(most)]
        rows += [tokens] * images
    hidden = torch.tensor(rows)
    return hidden if bool(hidden.any()) else None


class _Masking(TorchFunctionMode):
    """Inside, torch's attention is called with the mask of a run, for the attention module ``name``."""

    def __init__(self, run: RegionalTransformer, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | given
        named["attn_mask"] = self.run.attend(self.name, named["query"], named["key"], named.get("attn_mask"))
        return func(**named)


@contextmanager
def entering(module: nn.Module, made: Callable[[], Any]) -> Iterator[None]:
    """Inside, every call of ``module`` runs in a context that ``made`` returns."""
    running: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(made())
        running[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            running.pop().__exit__(None, None, None)


@contextmanager
def native(module: Any) -> Iterator[None]:
    """Inside, an attention module uses torch's own attention."""
    own = module.processor
    backend = getattr(own, "_attention_backend", None)
    kind = type(own).__name__
    try:
        if backend is not None:
            own._attention_backend = None
        if kind.startswith("XFormers"):
            plain: Any = JointAttnProcessor2_0 if "Joint" in kind else AttnProcessor2_0
            module.set_processor(plain())
        yield
    finally:
        if backend is not None:
            own._attention_backend = backend
        if kind.startswith("XFormers"):
            module.set_processor(own)
