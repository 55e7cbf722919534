"""Prompts encoded with the adapters that act in the text encoders and the words that adapters bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from adapters.formats.words import Words
from adapters.layers.gated import GatedAdapters
from pipelines.diffusion.families import Encoding, Family
from pipelines.diffusion.methods.step import TextAdapters
from pipelines.diffusion.rack import Loaded
from pipelines.diffusion.regions.concepts import expanded, knowing, layer_tokens, spelled, word_tokens
from pipelines.diffusion.regions.region import Region


class Prompts:
    """Encodes the prompts of one composition.

    Args:
        pipe: the diffusers pipeline.
        family: its family.
        loaded: the adapters of the composition.
        encoders: their matrices joined for each text encoder.
    """

    def __init__(
        self, pipe: Any, family: Family, loaded: Sequence[Loaded], encoders: Mapping[str, GatedAdapters]
    ) -> None:
        self.pipe, self.family, self.loaded, self.encoders = pipe, family, loaded, encoders

    @property
    def vocabulary(self) -> Words:
        """The words of pivotal tuning that the adapters bring."""
        return {word: encoders for item in self.loaded for word, encoders in item.file.words.items()}

    def layer_words(self, region: Region | None) -> dict[str, torch.Tensor]:
        """The words with an embedding per layer that the region's adapters bring."""
        files = {item.report.name: item.file for item in self.loaded}
        names = region.adapters if region else ()
        return {word: rows for name in names for word, rows in files[name].embeddings.items()}

    def encode(self, prompt: str, negative: str, images: int, guided: bool) -> Encoding:
        """A prompt and a negative one, by the text encoders as they are now."""
        words = self.vocabulary
        with knowing(self.pipe, word_tokens(words)):
            return self.family.encode(
                self.pipe, spelled(prompt, words), spelled(negative, words) or None, images, guided
            )

    def mean(self, text: str) -> torch.Tensor:
        """The mean-pooled embedding (width,) of a text, by the base model's text encoders."""
        with torch.no_grad():
            return self.encode(text, "", 1, False).positive["embeds"][0].float().mean(0)

    def by_adapters(
        self, sets: Sequence[TextAdapters], prompt: str, negative: str, images: int, guided: bool
    ) -> dict[TextAdapters, Encoding]:
        """The prompt encoded once for every different set of adapters in the text encoders."""
        made: dict[TextAdapters, Encoding] = {}
        with ExitStack() as stack:
            gates = [stack.enter_context(encoder.attached()) for encoder in self.encoders.values()]
            for active in dict.fromkeys(sets):
                strengths = [item.text_strength() if i in active else 0.0 for i, item in enumerate(self.loaded)]
                for gate in gates:
                    gate.joint(strengths)
                made[active] = self.encode(prompt, negative, images, guided)
        return made

    def by_regions(
        self, texts: Sequence[tuple[str, str]], regions: Sequence[Region], images: int, guided: bool
    ) -> list[Encoding]:
        """The text of the background and of every region, each by the text encoders with its own adapters.

        Args:
            texts: (prompt, negative prompt), the background's first.
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
                encoding = self.encode(prompt, negative, images, guided)
                words = self.layer_words(region)
                made.append(self._with_layers(encoding, prompt, words) if words else encoding)
        return made

    def _with_layers(self, encoding: Encoding, prompt: str, words: Mapping[str, torch.Tensor]) -> Encoding:
        """The encoding with one text per cross-attention layer beside it ("layers", (layers, tokens, width))."""
        vocabulary = self.vocabulary
        prompts: Any = expanded(spelled(prompt, vocabulary), words)
        tokens = word_tokens(vocabulary)
        tokens["text_encoder"] = tokens.get("text_encoder", {}) | layer_tokens(words)["text_encoder"]
        with knowing(self.pipe, tokens):
            made = self.family.encode(self.pipe, prompts, None, 1, False)
        return Encoding({**encoding.positive, "layers": made.positive["embeds"]}, encoding.negative)
