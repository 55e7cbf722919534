"""Encoding prompts with the adapters of the text encoders and the adapters' own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adapters.errors import InputError
from adapters.formats.words import Words
from adapters.layers.gated import GatedAdapters
from pipelines.diffusion import prompt_syntax
from pipelines.diffusion.families import Encoding, Family
from pipelines.diffusion.families.base import Tensors, tokenizer_of
from pipelines.diffusion.families.reading import Reader, needed, tokenize
from pipelines.diffusion.methods.step import TextAdapters
from pipelines.diffusion.prompt_syntax import Prompt, literal
from pipelines.diffusion.rack import Loaded
from pipelines.diffusion.regions.concepts import expanded, in_layer, knowing, layer_tokens, spelled, word_tokens
from pipelines.diffusion.regions.region import Region
from pipelines.diffusion.regions.words import positions, spanned

Counts = dict[str, int]
"""Kind of reader -> number of chunks."""


class Prompts:
    """Encodes the prompts of one composition.

    Args:
        pipe: the diffusers pipeline.
        family: its family.
        loaded: the adapters of the composition.
        encoders: their matrices joined for each text encoder.
        image: the picture that is edited, which is read together with the prompt.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        loaded: Sequence[Loaded],
        encoders: Mapping[str, GatedAdapters],
        image: Any = None,
    ) -> None:
        self.pipe, self.family, self.loaded, self.encoders = pipe, family, loaded, encoders
        self.image = image if family.edits(pipe) else None

    @property
    def vocabulary(self) -> Words:
        """The adapters' words of pivotal tuning."""
        return {word: encoders for item in self.loaded for word, encoders in item.file.words.items()}

    def layer_words(self, region: Region | None) -> dict[str, torch.Tensor]:
        """The words with an embedding per layer of the region's adapters (ED-LoRA)."""
        files = {item.report.name: item.file for item in self.loaded}
        names = region.adapters if region else ()
        return {word: rows for name in names for word, rows in files[name].embeddings.items()}

    def read(self, text: str) -> Prompt:
        """A prompt's words with their weights; the adapters' words are not replaced yet."""
        return prompt_syntax.read(text)

    def counts(self, texts: Sequence[str | Prompt], own: Mapping[str, torch.Tensor] | None = None) -> Counts:
        """Number of chunks that the longest of these texts needs, by kind of reader.

        Args:
            own: words with an embedding per layer.
        """
        found: Counts = {}
        with self._knowing(own or {}):
            for text in texts:
                prompt = self._spelled(text)
                for reader in self.family.readers(self.pipe):
                    count = needed(tokenizer_of(self.pipe, reader.encoder), reader, self._converted(reader, prompt))
                    found[reader.kind] = max(found.get(reader.kind, 1), count)
        return found

    def encode(
        self, prompt: str | Prompt, negative: str | Prompt, images: int, guided: bool, counts: Counts | None = None
    ) -> Encoding:
        """The encoding of a prompt and a negative prompt by the text encoders in their current state.

        Plain text that fits is encoded by the pipeline itself; long or weighted text is encoded here, in chunks.

        Args:
            images: number of copies of each text.
            guided: whether the negative prompt is needed.
            counts: chunks to encode; by default those of the two texts.

        Raises:
            InputError: weights or parts with a family that has no readers.
        """
        counts = self.counts([prompt, negative] if guided else [prompt]) if counts is None else counts
        with self._knowing({}):
            given, avoided = self._spelled(prompt), self._spelled(negative)
            own_way = all(count == 1 for count in counts.values())
            if own_way and given.plain and (avoided.plain or not guided):
                texts = given.words, avoided.words or None, images, guided
                if self.image is not None:
                    return self.family.encode_seen(self.pipe, *texts, self.image)
                return self.family.encode(self.pipe, *texts)
            positive = self._encode(given, counts)
            zeros = self.family.zeros_field and getattr(self.pipe.config, self.family.zeros_field, False)
            if guided and zeros and not avoided.words:
                without = {name: torch.zeros_like(tensor) for name, tensor in positive.items()}
            else:
                without = self._encode(avoided, counts) if guided else {}
        return self.family.encoding(_rows(positive, images), _rows(without, images), guided)

    def mean(self, text: str) -> torch.Tensor:
        """The mean-pooled embedding (width,) of a text taken literally, by the base model's text encoders."""
        with torch.no_grad():
            states = self.encode(literal(text), literal(""), 1, False).positive[self.family.text_tensors[0]]
            return states[0].float().mean(0).flatten()

    def remarks(self, texts: Sequence[str]) -> list[str]:
        """Remarks on long texts: encoded in chunks, or truncated (with the words that are lost)."""
        remarks: list[str] = []
        readers = self.family.readers(self.pipe)
        for text in dict.fromkeys(texts):
            if not readers and self.family.too_long(self.pipe, self._spelled(text).words):
                remarks.append("The prompt is longer than this model can read: its end is lost.")
            with self._knowing({}):
                prompt = self._spelled(text)
                lost, chunks = "", 1
                for reader in readers:
                    tokenizer = tokenizer_of(self.pipe, reader.encoder)
                    here = self._converted(reader, prompt)
                    count = needed(tokenizer, reader, here)
                    chunks = max(chunks, count if reader.kind == "clip" else 1)
                    lost = tokenize(tokenizer, reader, here, count).lost if reader.places else lost
            if lost:
                remarks.append(f"The prompt is longer than this model can read; its last words are lost: '{lost}'.")
            elif chunks > 1:
                remarks.append(f"The prompt is longer than the text encoder reads at once: encoded in {chunks} chunks.")
        return list(dict.fromkeys(remarks))

    def positions(
        self, text: str, words: Sequence[str], title: str, region: Region | None, counts: Counts
    ) -> list[int]:
        """Positions of the words in the denoiser's text sequence, ascending.

        Raises:
            InputError: as :func:`pipelines.diffusion.regions.words.positions`.
        """
        own = self.layer_words(region)
        if not self.family.readers(self.pipe):
            prompt = self.read(text)
            return spanned(self.family.text_spans(self.pipe, prompt.words), words, prompt.words, title)
        found: list[int] = []
        start, kinds = 0, set()
        with self._knowing(own):
            prompt = self._spelled(text)
            for reader in self.family.readers(self.pipe):
                if not reader.places or reader.kind in kinds:
                    continue
                kinds.add(reader.kind)
                tokenizer = tokenizer_of(self.pipe, reader.encoder)
                count = counts.get(reader.kind, 1)
                tokens = tokenize(tokenizer, reader, self._converted(reader, prompt), count)
                named = {word: tokenizer(spelled(word, self.vocabulary), add_special_tokens=False).input_ids
                         for word in words}  # fmt: skip
                found += [start + place for place in positions(tokens, named, prompt.words, title)]
                start += reader.length * count
        return sorted(found)

    def by_adapters(
        self, sets: Sequence[TextAdapters], prompt: str, negative: str, images: int, guided: bool
    ) -> dict[TextAdapters, Encoding]:
        """The prompt encoded once for every different set of adapters active in the text encoders."""
        made: dict[TextAdapters, Encoding] = {}
        counts = self.counts([prompt, negative] if guided else [prompt])
        with ExitStack() as stack:
            gates = [stack.enter_context(encoder.attached()) for encoder in self.encoders.values()]
            for active in dict.fromkeys(sets):
                strengths = [item.text_strength() if i in active else 0.0 for i, item in enumerate(self.loaded)]
                for gate in gates:
                    gate.joint(strengths)
                made[active] = self.encode(prompt, negative, images, guided, counts)
        return made

    def counts_of_regions(self, texts: Sequence[tuple[str, str]], regions: Sequence[Region], guided: bool) -> Counts:
        """Number of chunks that the texts of :meth:`by_regions` need, by kind of reader."""
        own = {word: rows for region in regions for word, rows in self.layer_words(region).items()}
        return self.counts([text for pair in texts for text in (pair if guided else pair[:1])], own)

    def by_regions(
        self, texts: Sequence[tuple[str, str]], regions: Sequence[Region], images: int, guided: bool, counts: Counts
    ) -> list[Encoding]:
        """The texts of the background and of every region, each encoded with its own adapters.

        Args:
            texts: (prompt, negative prompt) of each, the background first.
            counts: from :meth:`counts_of_regions`.
        """
        placed = {name for region in regions for name in region.adapters}
        made = []
        with ExitStack() as stack:
            gates = [stack.enter_context(encoder.attached()) for encoder in self.encoders.values()]
            for (prompt, negative), region in zip(texts, (None, *regions), strict=True):
                strengths = []
                for item in self.loaded:
                    own = region is not None and item.report.name in region.adapters
                    factor = region.scale if region is not None and own else 1.0
                    acts = own or item.report.name not in placed
                    strengths.append(item.text_strength() * factor if acts else 0.0)
                for gate in gates:
                    gate.joint(strengths)
                words = self.layer_words(region)
                encoding = self.encode(prompt, negative, images, guided, counts)
                made.append(self._with_layers(encoding, prompt, words, counts) if words else encoding)
        return made

    def _with_layers(
        self, encoding: Encoding, text: str, words: Mapping[str, torch.Tensor], counts: Counts
    ) -> Encoding:
        """The encoding with another entry "layers" (layers, tokens, width): one text per cross-attention layer."""
        with self._knowing(words):
            prompt = self._spelled(text)
            if prompt.plain and all(count == 1 for count in counts.values()):
                layered: Any = expanded(prompt.words, words)
                embeds = self.family.encode(self.pipe, layered, None, 1, False).positive["embeds"]
            else:
                layers = [prompt.mapped(partial(in_layer, words=words, layer=k)) for k in range(_depth(words))]
                embeds = torch.cat([self._encode(layer, counts)["embeds"] for layer in layers])
        return replace(encoding, positive={**encoding.positive, "layers": embeds})

    def _encode(self, prompt: Prompt, counts: Counts) -> Tensors:
        """Embeddings (batch 1) of a prompt whose words are already replaced by their tokens."""
        readers = self.family.readers(self.pipe)
        if not readers:
            raise InputError(
                f"{self.family.title} does not support weights in a prompt: remove (word:1.3), [word] and BREAK."
            )
        tokens = {
            reader.encoder: tokenize(
                tokenizer_of(self.pipe, reader.encoder), reader, self._converted(reader, prompt),
                min(counts.get(reader.kind, 1), reader.most),
            )
            for reader in readers
        }  # fmt: skip
        return self.family.encode_tokenized(self.pipe, tokens)

    def _spelled(self, text: str | Prompt) -> Prompt:
        """A prompt with the words of pivotal tuning replaced by their tokens."""
        prompt = self.read(text) if isinstance(text, str) else text
        vocabulary = self.vocabulary
        return prompt.mapped(lambda piece: spelled(piece, vocabulary)) if vocabulary else prompt

    def _converted(self, reader: Reader, prompt: Prompt) -> Prompt:
        """``prompt`` with the pipeline's own textual inversions replaced by their tokens."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        if convert is None or reader.kind != "clip":
            return prompt
        tokenizer = tokenizer_of(self.pipe, reader.encoder)
        return prompt.mapped(lambda piece: convert(piece, tokenizer) if piece.strip() else piece)

    def _knowing(self, own: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, tokenizers and encoders know the adapters' words; ``own`` are words with an embedding per layer."""
        tokens = word_tokens(self.vocabulary)
        if own:
            tokens["text_encoder"] = tokens.get("text_encoder", {}) | layer_tokens(own)["text_encoder"]
        return knowing(self.pipe, tokens)


def _rows(tensors: Tensors, images: int) -> Tensors:
    return {name: tensor.repeat(images, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}


def _depth(words: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(words.values())))
