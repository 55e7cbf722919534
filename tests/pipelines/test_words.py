"""Words of pivotal tuning: the file of kohya's programs, and what a word means in a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import FamilyError, InputError
from adapters.files import WORDS, WORDS_ENTRY
from adapters.formats import LoraFile, read, write_diffusers, write_kohya, write_peft
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from studio.adapter_files import merging
from studio.library import scan
from tests import tiny
from tests.pipelines.conftest import close, latents
from tests.pipelines.test_regions import LEFT, RIGHT, regional

MODULE = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k"


def bundle(path: Path, embeddings: dict[str, torch.Tensor], sdxl: bool = False) -> Path:
    """A kohya file for the tiny model with words beside its layer."""
    into = 40 if sdxl else 16
    name, out = MODULE.format(int(sdxl)), 32 if sdxl else 16
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, into, generator=generator),
        f"{name}.lora_up.weight": torch.randn(out, 2, generator=generator),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(tensors | {f"bundle_emb.{key}": value.clone() for key, value in embeddings.items()}, path)
    return path


def rows_of(pipe: Any, *letters: str, encoder: str = "text_encoder") -> torch.Tensor:
    """The rows that a model itself has for single letters."""
    numbers = pipe.tokenizer.convert_tokens_to_ids([f"{letter}</w>" for letter in letters])
    rows: torch.Tensor = getattr(pipe, encoder).get_input_embeddings().weight[numbers].detach()
    return rows


def loaded(path: Path, sdxl: bool = False) -> MultiLoRAPipeline:
    composer = MultiLoRAPipeline(tiny.sdxl() if sdxl else tiny.sd())
    composer.load_lora(path, "toy")
    return composer


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params"])
def test_a_word_is_its_vectors(tmp_path: Path, key: str) -> None:
    """Rows that the model has for two letters: the word is those two letters, in every method and place."""
    rows = rows_of(tiny.sd(), "x", "y")
    extra = {"toy.string_to_token.*": torch.tensor([265])}
    composer = loaded(bundle(tmp_path / "a.safetensors", {f"toy.{key}": rows, **extra}))
    assert composer.adapters["toy"].triggers == ("toy",)
    for method in ("merge", "switch", "composite"):
        found = latents(composer, method, prompt="a Toy, b", negative_prompt="toy")
        close(found, latents(composer, method, prompt="a x y, b", negative_prompt="x y"))
        assert not torch.allclose(found, latents(composer, method, prompt="a toys, b", negative_prompt="x y"))
    place = {"box": LEFT, "words": ("toy",)}
    found = regional(composer, "lora-composer", Region(("toy",), prompt="a toy", **place))
    spelled = regional(composer, "lora-composer", Region(("toy",), box=LEFT, prompt="a x y", words=("x y",)))
    close(found, spelled)


def test_sdxl_has_a_vector_for_both_encoders_and_the_end_mark_stays(tmp_path: Path) -> None:
    pipe = tiny.sdxl()
    rows = {f"toy.{key}": rows_of(pipe, "x", encoder=encoder) for key, encoder in
            (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))}  # fmt: skip
    composer = loaded(bundle(tmp_path / "a.safetensors", rows, sdxl=True), sdxl=True)
    composer.pipe.text_encoder_2.config.eos_token_id = 2  # as in the published models: the largest number is the end
    close(latents(composer, "merge", prompt="a toy"), latents(composer, "merge", prompt="a x"))
    assert "<toy:0>" not in composer.pipe.tokenizer_2.get_vocab()


def test_words_go_through_every_format_that_has_a_place_for_them(tmp_path: Path) -> None:
    first = read(bundle(tmp_path / "a.safetensors", {"toy.emb_params": torch.randn(2, 16)}))
    again = read(write_kohya(first, tmp_path / "b.safetensors"))
    assert torch.equal(again.words["toy"]["text_encoder"], first.words["toy"]["text_encoder"])
    assert "bundle_emb.toy.string_to_param.*" in load_file(tmp_path / "b.safetensors")
    named = LoraFile({"unet": {"mid_block.x": next(layer for _, _, layer in first.layers())}}, words=first.words)
    folder = tmp_path / "own"
    other = read(write_diffusers(named, folder / "c.safetensors"))
    assert torch.equal(other.words["toy"]["text_encoder"], first.words["toy"]["text_encoder"])
    assert read(folder).words.keys() == {"toy"}  # a folder with an adapter and its words holds one adapter
    rows = LoraFile(named.parts, embeddings={"<hina>": torch.randn(4, 16)})
    back = read(write_diffusers(rows, tmp_path / "d.safetensors"))
    assert torch.equal(back.embeddings["<hina>"], rows.embeddings["<hina>"])
    with pytest.raises(InputError, match="PEFT directory cannot hold"):
        write_peft(named, tmp_path / "peft")
    (folder / f"c{WORDS}").unlink()
    with pytest.raises(InputError, match=r"with the words .* is missing"):
        read(folder / "c.safetensors")


def test_the_library_knows_the_words_and_merging_keeps_them(tmp_path: Path) -> None:
    files = [read(bundle(tmp_path / f"{word}.safetensors", {f"{word}.emb_params": torch.randn(1, 16)}))
             for word in ("toy", "doll")]  # fmt: skip
    assert scan.record(tmp_path / "toy.safetensors", "adapter").triggers == ("toy",)
    merged = merging.merge("concatenate", files, [1.0, 1.0]).file
    assert merged.words.keys() == {"toy", "doll"}
    with pytest.raises(InputError, match="Two of the adapters have the word 'toy'"):
        merging.merge("concatenate", [files[0], files[0]], [1.0, 1.0])
    named = LoraFile({"unet": {"mid_block.x": next(layer for _, _, layer in merged.layers())}}, words=merged.words)
    write_diffusers(named, tmp_path / "both.safetensors")
    found = scan.record(tmp_path / "both.safetensors", "adapter")
    assert sorted(found.triggers) == ["doll", "toy"]
    assert not found.problem


@pytest.mark.parametrize(
    ("embeddings", "sentence"),
    [
        ({"toy.t5": torch.ones(1, 16)}, "only CLIP's are supported"),
        ({"toy.emb_params": torch.ones(1, 2, 16)}, "must be \\(vectors, width\\)"),
        ({"toy.emb_params": torch.ones(1, 16), "toy.clip_l": torch.ones(1, 16)}, "two embeddings"),
        ({"toy.clip_l": torch.ones(1, 16), "toy.clip_g": torch.ones(2, 24)}, "more vectors for one text encoder"),
        ({"toy.string_to_token.*": torch.ones(1)}, "has no embedding"),
        ({"toy.emb_params": torch.full((1, 16), float("nan"))}, "NaN"),
        ({"toy.emb_params": torch.ones(1, 17)}, "of width text_encoder 17; Stable Diffusion .* needs text_encoder 16"),
        ({"toy.clip_l": torch.ones(1, 16), "toy.clip_g": torch.ones(1, 24)}, "needs text_encoder 16"),
    ],
)
def test_words_that_do_not_fit(tmp_path: Path, embeddings: dict[str, torch.Tensor], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        loaded(bundle(tmp_path / "a.safetensors", embeddings))


def test_wrong_files(tmp_path: Path) -> None:
    path = bundle(tmp_path / "a.safetensors", {"toy.emb_params": torch.ones(1, 16)})
    composer = loaded(path)
    with pytest.raises(InputError, match="already taken"):
        composer.load_lora(path, "again")
    flux, file = MultiLoRAPipeline(tiny.flux()), read(path)
    with pytest.raises(FamilyError, match="needs none"):
        flux.rack._check_words(file, "toy")
    save_file({"bundle_emb.toy.emb_params": torch.ones(1, 16)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="an embedding, not an adapter"):
        read(tmp_path / "b.safetensors")
    for text, sentence in ((json.dumps(["toy"]), "does not hold the words"), ("[", "not a list of words")):
        tensors = {key: value for key, value in load_file(path).items() if not key.startswith("bundle")}
        save_file(tensors, tmp_path / "c.safetensors", metadata={WORDS_ENTRY: text})
        save_file({"bundle_emb.doll.emb_params": torch.ones(1, 16)}, tmp_path / f"c{WORDS}")
        with pytest.raises(InputError, match=sentence):
            read(tmp_path / "c.safetensors")


def test_two_adapters_with_words_in_their_places(tmp_path: Path) -> None:
    composer = loaded(bundle(tmp_path / "a.safetensors", {"toy.emb_params": rows_of(tiny.sd(), "x")}))
    composer.load_lora(bundle(tmp_path / "b.safetensors", {"doll.emb_params": rows_of(tiny.sd(), "y")}), "doll")
    regions = Region(("toy",), box=LEFT, prompt="a toy"), Region(("doll",), box=RIGHT, prompt="a doll")
    spelled = Region(("toy",), box=LEFT, prompt="a x"), Region(("doll",), box=RIGHT, prompt="a y")
    close(regional(composer, "activation", *regions), regional(composer, "activation", *spelled))
