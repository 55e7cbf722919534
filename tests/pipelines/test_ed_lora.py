"""ED-LoRA: both spellings, the way back, and a word with an embedding per layer in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import FamilyError, InputError
from adapters.formats import read
from adapters.formats.ed_lora import write_ed_lora
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from tests import tiny
from tests.pipelines.conftest import close
from tests.pipelines.test_regions import ALL, LEFT, RIGHT, regional

LAYERS, WIDTH = 4, 16
"""Of the tiny Stable Diffusion: cross-attention layers, width of the text."""


def checkpoint(path: Path, old: bool = False, word: str = "<hina>", rows: torch.Tensor | None = None) -> Path:
    """A checkpoint for the tiny model in today's or the older spelling."""
    generator = torch.Generator().manual_seed(1)
    unet, text = {}, {}
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    for name, out, into in (("to_k", 16, 16), ("to_v", 16, 16), ("to_out.0", 16, 16)):
        module = f"{block}.{name}" if not old else f"{block}.processor.{name.removesuffix('.0')}"
        down, up = torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator)
        unet[f"{module}_lora.down.weight" if old else f"{module}.lora_down.weight"] = down
        unet[f"{module}_lora.up.weight" if old else f"{module}.lora_up.weight"] = up
    for half, shape in (("down", (4, 16)), ("up", (16, 4))):
        tensor = torch.randn(shape, generator=generator)
        text[f"text_model.encoder.layers.0.self_attn.q_proj{'_lora.' if old else '.lora_'}{half}.weight"] = tensor
    rows = torch.randn(LAYERS, WIDTH, generator=generator) if rows is None else rows
    params = {"new_concept_embedding": {word: rows}, "unet": unet, "text_encoder": text}
    torch.save({"params": params}, path)
    return path


def test_both_spellings_are_the_same_and_alpha_is_a_plain_multiplier(tmp_path: Path) -> None:
    new, old = read(checkpoint(tmp_path / "new.pth")), read(checkpoint(tmp_path / "old.pth", old=True))
    assert new.format == "ed-lora"
    layers = {(c, m): layer for c, m, layer in new.layers()}
    assert {(c, m) for c, m, _ in old.layers()} == set(layers)
    for component, module, layer in old.layers():
        same = layers[component, module]
        assert torch.equal(layer.A, same.A)
        assert torch.equal(layer.B, same.B)
        assert torch.allclose(layer.delta(), layer.B @ layer.A)
    assert torch.equal(new.embeddings["<hina>"], old.embeddings["<hina>"])


def test_the_way_back(tmp_path: Path) -> None:
    first = read(checkpoint(tmp_path / "a.pth"))
    again = read(write_ed_lora(first, tmp_path / "b.pth"))
    assert torch.equal(first.embeddings["<hina>"], again.embeddings["<hina>"])
    for (component, module, layer), (c, m, other) in zip(first.layers(), again.layers(), strict=True):
        assert (component, module) == (c, m)
        assert torch.allclose(layer.delta(), other.delta())


def loaded(path: Path) -> MultiLoRAPipeline:
    composer = MultiLoRAPipeline(tiny.sd())
    composer.load_lora(path, "hina")
    return composer


def test_equal_rows_are_a_plain_word(tmp_path: Path) -> None:
    """All rows those of a word that the model has: the picture is that of the word."""
    pipe = tiny.sd()
    number = pipe.tokenizer.convert_tokens_to_ids("x</w>")
    row = pipe.text_encoder.get_input_embeddings().weight[number].detach()
    composer = loaded(checkpoint(tmp_path / "a.pth", rows=row.repeat(LAYERS, 1)))
    assert composer.adapters["hina"].triggers == ("<hina>",)
    found = regional(composer, "cross", Region(("hina",), box=LEFT, prompt="a <hina> b"))
    close(found, regional(composer, "cross", Region(("hina",), box=LEFT, prompt="a x b")))
    assert composer.pipe.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    other = loaded(checkpoint(tmp_path / "b.pth"))
    assert not torch.allclose(found, regional(other, "cross", Region(("hina",), box=LEFT, prompt="a <hina> b")))


def test_with_all_parts(tmp_path: Path) -> None:
    composer = loaded(checkpoint(tmp_path / "a.pth"))
    composer.load_lora(checkpoint(tmp_path / "b.pth", word="<ryo>"), "ryo")
    regions = (
        Region(("hina",), box=LEFT, prompt="a <hina>"),
        Region(("ryo",), box=RIGHT, prompt="a <ryo>"),
    )
    assert bool(torch.isfinite(regional(composer, "lora-composer", *regions, refine=True)).all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": torch.ones(LAYERS + 1, WIDTH)}, "4 cross-attention layers"),
        ({"rows": torch.ones(LAYERS, WIDTH + 1)}, "text width of 16"),
        ({"rows": torch.ones(WIDTH)}, "must be \\(layers, width\\)"),
        ({"rows": torch.full((LAYERS, WIDTH), float("nan"))}, "NaN"),
        ({"word": "x</w>"}, "already taken"),
    ],
)
def test_words_that_do_not_fit(tmp_path: Path, change: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        loaded(checkpoint(tmp_path / "a.pth", **change))


def test_wrong_uses(tmp_path: Path) -> None:
    composer = loaded(checkpoint(tmp_path / "a.pth"))
    with pytest.raises(InputError, match="already taken"):
        composer.load_lora(checkpoint(tmp_path / "b.pth"), "again")
    with pytest.raises(InputError, match="embedding per layer"):
        composer.compose("merge").plan(steps=1)
    file = read(tmp_path / "a.pth")
    with pytest.raises(FamilyError, match="ED-LoRA, made for Stable Diffusion 1"):
        MultiLoRAPipeline(tiny.sdxl()).load_lora(file.with_parts({"text_encoder": file.parts["text_encoder"]}))
    composer.compose("lora-composer", regions=[Region(("hina",), box=ALL, prompt="nobody")])
    with pytest.raises(InputError, match="which word"):
        composer("a cat", steps=1, width=32, height=32)
