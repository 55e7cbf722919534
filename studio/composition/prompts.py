"""Prepares the texts of a composition: wildcards chosen by the seed, and adapters that the prompt names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.diffusion import prompt_syntax
from pipelines.diffusion.wildcards import lines_of
from studio import settings
from studio.composition.schema import AdapterUse, ComposeConfig

FOLDER = "wildcards"
"""Folder below home: colour.txt for the wildcard __colour__."""


def open_choices(config: ComposeConfig) -> bool:
    """Whether a text depends on the seed; raises :class:`InputError` for syntax that is not supported."""
    regions = config.regions if isinstance(config.regions, list) else []
    texts = [text or "" for region in regions for text in (region.prompt, region.negative)]
    return any(prompt_syntax.has_choices(text) for text in (config.prompt, config.negative_prompt, *texts))


def decided(config: ComposeConfig, seed: int) -> ComposeConfig:
    """The configuration with every choice made by the seed.

    Raises:
        InputError: a wildcard without a file, or syntax that is not supported.
    """
    lines = lines_of(settings.home() / FOLDER)

    def said(text: str) -> str:
        return prompt_syntax.chosen(text, seed, lines)

    changes: dict[str, Any] = {name: said(getattr(config, name)) for name in ("prompt", "negative_prompt")}
    if isinstance(config.regions, list):
        changes["regions"] = [
            region.model_copy(
                update={"prompt": said(region.prompt), "negative": region.negative and said(region.negative)}
            )
            for region in config.regions
        ]
    return config.model_copy(update=changes)


def with_named(config: ComposeConfig) -> tuple[ComposeConfig, list[str]]:
    """The configuration with the adapters that the prompt names added (at the prompt's strength), and remarks."""
    prompt, named = prompt_syntax.without_adapters(config.prompt)
    uses, said = list(config.adapters), []
    for adapter in named:
        strength = {"weight": adapter.weight, "te_weight": adapter.te_weight}
        place = next((k for k, use in enumerate(uses) if adapter.name in _names(use)), None)
        if place is None:
            said.append(f"'{adapter.name}' acts at {adapter.weight:g}, as <lora:{adapter.name}> in the prompt says.")
            uses.append(AdapterUse.parse({"name": Path(adapter.name).stem, "path": adapter.name, **strength}))
            continue
        if uses[place].weight not in (1.0, adapter.weight):
            given = f"{uses[place].weight:g} was given beside it"
            said.append(f"'{adapter.name}' acts at {adapter.weight:g}, as the prompt says ({given}).")
        uses[place] = uses[place].model_copy(update=strength)
    return config.model_copy(update={"prompt": prompt, "adapters": uses}), said


def told(before: ComposeConfig, after: ComposeConfig) -> dict[str, Any]:
    """The recipe's entries on the texts: as they were written, if that differs, and the words with weights."""
    names = ("prompt", "negative_prompt")
    written = {name: getattr(before, name) for name in names if getattr(before, name) != getattr(after, name)}
    weights = {} if open_choices(after) else {name: prompt_syntax.read(getattr(after, name)).emphasis for name in names}
    return {
        **({"written": written} if written else {}),
        **({"emphasis": weights} if any(weights.values()) else {}),
    }


def _names(use: AdapterUse) -> set[str]:
    return {use.name, use.path, Path(use.path).stem} - {""}
