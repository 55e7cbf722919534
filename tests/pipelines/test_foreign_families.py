"""Adapter files of the newer families as other programs write them: the same update as by diffusers' own converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders.single_file_utils import (
    convert_lumina2_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.formats import read
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families import FAMILIES, detect, find
from pipelines.diffusion.families.base import Family
from studio.library import facts
from tests import tiny

Tensors = dict[str, Tensor]


def lora(family: str, name: Callable[[str], str], down: str, up: str, alpha: bool) -> Tensors:
    """A LoRA of rank 2 on every layer of the choice 'linear', with names as written by a program."""
    made: Tensors = {}
    dice = torch.Generator().manual_seed(5)
    for module, layer in linears(family).items():
        made[f"{name(module)}.{down}.weight"] = torch.randn(2, layer.in_features, generator=dice)
        made[f"{name(module)}.{up}.weight"] = torch.randn(layer.out_features, 2, generator=dice)
        if alpha:
            made[f"{name(module)}.alpha"] = torch.tensor(3.0)
    return made


def linears(family: str) -> dict[str, nn.Linear]:
    import re

    modules = tiny.FAMILIES[family]().transformer.named_modules()
    pattern = FAMILIES[family].targets["linear"]
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and re.fullmatch(pattern, name)}


def updates(composer: MultiLoRAPipeline) -> dict[str, Tensor]:
    """Module -> its update."""
    loaded = next(iter(composer.rack.loaded.values()))
    return {name: layer.delta() for name, layer in loaded.file.parts["transformer"].items()}


def converted(tensors: Tensors) -> dict[str, Tensor]:
    """Module -> its update, of a file in diffusers' format."""
    names = {key.split(".lora_")[0] for key in tensors}
    return {
        name.removeprefix("transformer."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def krea(module: str) -> str:
    """A module of Krea 2 in its authors' code."""
    module = module.replace("text_fusion.", "txtfusion.").replace("transformer_blocks.", "blocks.")
    for new, old in (("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"), ("attn.to_v", "attn.wv"),
                     ("attn.to_out.0", "attn.wo"), ("attn.to_gate", "attn.gate"), ("ff.", "mlp.")):  # fmt: skip
        module = module.replace(new, old)
    return module


FILES: dict[str, tuple[str, Callable[[str], str], str, str, bool, str]] = {
    "qwen, ComfyUI": ("qwen", lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", False, "qwen"),
    "qwen, musubi": ("qwen", lambda m: f"lora_unet_{m.replace('.', '_')}", "lora_down", "lora_up", True, "qwen"),
    "qwen, without prefix": ("qwen", lambda m: m, "lora_down", "lora_up", True, "qwen"),
    "krea2, ComfyUI": ("krea2", lambda m: f"diffusion_model.{krea(m)}", "lora_A", "lora_B", False, "krea2"),
    "krea2, ai-toolkit": ("krea2", lambda m: f"base_model.model.{krea(m)}", "lora_A", "lora_B", False, "krea2"),
    "hidream, ai-toolkit": ("hidream", lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", False, "hidream"),
}


@pytest.mark.parametrize("written", FILES)
def test_the_update_is_that_of_diffusers_converter(written: str, tmp_path: Path) -> None:
    family, name, down, up, alpha, converter = FILES[written]
    tensors = lora(family, name, down, up, alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    assert facts.adapter(tmp_path / "a.safetensors")["family"] == family
    composer = MultiLoRAPipeline(tiny.FAMILIES[family]())
    composer.load_lora(tmp_path / "a.safetensors")
    found = updates(composer)
    wanted = converted(getattr(converters, f"_convert_non_diffusers_{converter}_lora_to_diffusers")(dict(tensors)))
    assert found.keys() == wanted.keys() == linears(family).keys()
    for module, update in wanted.items():
        torch.testing.assert_close(found[module], update)


@pytest.mark.parametrize("family", ["qwen", "krea2", "hidream"])
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lokr_is_its_kronecker_product(family: str, prefix: str, tmp_path: Path) -> None:
    """diffusers reads none of these."""
    tensors: Tensors = {}
    dice = torch.Generator().manual_seed(5)
    wanted = {}
    for module, layer in linears(family).items():
        one = torch.randn(2, 2, generator=dice)
        two = torch.randn(layer.out_features // 2, layer.in_features // 2, generator=dice)
        name = prefix + module.replace(".", "_")
        tensors |= {f"{name}.lokr_w1": one, f"{name}.lokr_w2": two, f"{name}.alpha": torch.tensor(1.0)}
        wanted[module] = torch.kron(one, two)
    save_file(tensors, tmp_path / "a.safetensors")
    composer = MultiLoRAPipeline(tiny.FAMILIES[family]())
    composer.load_lora(tmp_path / "a.safetensors")
    for module, update in updates(composer).items():
        torch.testing.assert_close(update, wanted[module], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("transformer_blocks.3.img_mod.1.weight", "qwen"),
        ("model.diffusion_model.txtfusion.projector.weight", "krea2"),
        ("double_stream_blocks.0.block.attn1.to_q.weight", "hidream"),
    ],
)
def test_single_files_are_recognised_and_say_what_is_missing(key: str, family: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "m.safetensors")
    assert detect(tmp_path / "m.safetensors").name == family
    with pytest.raises(InputError, match="from a directory or hub id only"):
        MultiLoRAPipeline.from_pretrained(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("index", "kind", "words"),
    [
        ("modular_model_index.json", "Flux3ModularPipeline", "is Flux 3, which is not supported: diffusers has"),
        ("modular_model_index.json", "AnimaModularPipeline", "is Anima, which is not supported"),
        ("model_index.json", "Ideogram4Pipeline", "is Ideogram 4, which is not supported: its pipeline"),
    ],
)
def test_families_that_do_not_fit_are_refused_by_name(index: str, kind: str, words: str, tmp_path: Path) -> None:
    import diffusers

    assert hasattr(diffusers, kind)
    (tmp_path / index).write_text(f'{{"_class_name": "{kind}"}}', encoding="utf-8")
    with pytest.raises(InputError, match=words):
        detect(tmp_path)


def test_without_torchvision_an_edit_base_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}', encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="install torchvision"):
        MultiLoRAPipeline.from_pretrained(tmp_path)


def test_every_choice_of_layers_is_larger_than_the_one_before() -> None:
    import re

    def chosen(family: Family, choice: str) -> set[str]:
        modules: Any = tiny.FAMILIES[family.name]().transformer.named_modules()
        return {n for n, m in modules if isinstance(m, nn.Linear) and re.fullmatch(family.targets[choice], n)}

    for name in ("qwen", "krea2", "hidream"):
        sets = [chosen(find(name), choice) for choice in ("attention", "attention-mlp", "linear")]
        assert sets[0] < sets[1] < sets[2]


def original(hidden: int, keys: int, modulation: str) -> dict[str, tuple[int, int]]:
    """Modules of Z-Image's and Lumina 2's original code -> (outputs, inputs)."""
    sizes: dict[str, tuple[int, int]] = {}
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"):
        sizes[f"{block}.attention.qkv"] = hidden + 2 * keys, hidden
        sizes[f"{block}.attention.out"] = hidden, hidden
        for number in (1, 2, 3):
            sizes[f"{block}.feed_forward.w{number}"] = (hidden, 40) if number == 2 else (40, hidden)
        if not block.startswith("context"):
            sizes[f"{block}.{modulation}"] = 4 * hidden, 24
    return sizes


@pytest.mark.parametrize("written", ["ComfyUI", "kohya"])
@pytest.mark.parametrize(
    ("family", "modules", "reference"),
    [
        (
            "z-image",
            original(48, 48, "adaLN_modulation.0") | {"x_embedder": (48, 16), "final_layer.linear": (16, 48)},
            convert_z_image_transformer_checkpoint_to_diffusers,
        ),
        ("lumina2", original(2304, 768, "adaLN_modulation.1"), convert_lumina2_to_diffusers),
    ],
    ids=["z-image", "lumina2"],
)
def test_joined_layers_are_what_diffusers_makes_of_whole_models(
    family: str, modules: dict[str, tuple[int, int]], reference: Any, written: str, tmp_path: Path
) -> None:
    """The updates as a checkpoint of their own, through diffusers' converter of whole models."""
    tensors, checkpoint, dice = {}, {}, torch.Generator().manual_seed(4)
    for module, (out, inside) in modules.items():
        A, B = torch.randn(1, inside, generator=dice), torch.randn(out, 1, generator=dice)
        checkpoint[f"{module}.weight"] = 3 * B @ A
        name, down, up = f"diffusion_model.{module}", "lora_A", "lora_B"
        if written == "kohya":
            name, down, up = "lora_unet_" + module.replace(".", "_"), "lora_down", "lora_up"
        tensors |= {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert facts.adapter(tmp_path / "x.safetensors")["family"] == family
    named = find(family).named(read(tmp_path / "x.safetensors"), None).parts["transformer"]
    wanted = {key.removesuffix(".weight").replace(".", "_"): value for key, value in reference(checkpoint).items()}
    assert set(named) == set(wanted)
    for module, value in wanted.items():
        torch.testing.assert_close(named[module].delta(), value)
