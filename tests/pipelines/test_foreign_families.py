"""Adapter files of the newer families as other programs write them: the same update as by diffusers' own converter."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders.single_file_utils import (
    convert_auraflow_transformer_checkpoint_to_diffusers,
    convert_ernie_image_transformer_checkpoint_to_diffusers,
    convert_lumina2_to_diffusers,
    convert_sana_transformer_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.errors import FamilyError, InputError
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


WIDTH = 12


def auraflow_original() -> dict[str, tuple[int, int]]:
    """Modules of AuraFlow's original code -> (outputs, inputs)."""
    sizes = {f"double_layers.0.attn.w{side}{one}": (WIDTH, WIDTH) for side in "12" for one in "qkvo"}
    sizes |= {f"single_layers.{number}.attn.w1{one}": (WIDTH, WIDTH) for number in (0, 1) for one in "qkvo"}
    for place in ("double_layers.0.mlpX", "double_layers.0.mlpC", "single_layers.0.mlp", "single_layers.1.mlp"):
        sizes |= {f"{place}.c_fc1": (20, WIDTH), f"{place}.c_fc2": (20, WIDTH), f"{place}.c_proj": (WIDTH, 20)}
    modulations = ("double_layers.0.modX.1", "double_layers.0.modC.1", "single_layers.0.modCX.1",
                   "single_layers.1.modCX.1")  # fmt: skip
    sizes |= dict.fromkeys(modulations, (6 * WIDTH, WIDTH))
    return sizes | {
        "t_embedder.mlp.0": (WIDTH, 6), "t_embedder.mlp.2": (WIDTH, WIDTH), "cond_seq_linear": (WIDTH, 7),
        "init_x_linear": (WIDTH, 16), "modF.1": (2 * WIDTH, WIDTH), "final_linear": (16, WIDTH),
    }  # fmt: skip


def sana_original() -> dict[str, tuple[int, ...]]:
    """Modules of Sana's original code -> (outputs, inputs, kernel)."""
    sizes: dict[str, tuple[int, ...]] = {}
    for block in ("blocks.0", "blocks.1"):
        sizes |= {
            f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH),
            f"{block}.cross_attn.q_linear": (WIDTH, WIDTH), f"{block}.cross_attn.kv_linear": (2 * WIDTH, WIDTH),
            f"{block}.cross_attn.proj": (WIDTH, WIDTH),
            f"{block}.mlp.inverted_conv.conv": (20, WIDTH, 1, 1), f"{block}.mlp.point_conv.conv": (WIDTH, 10, 1, 1),
        }  # fmt: skip
    return sizes | {"t_embedder.mlp.0": (WIDTH, 6), "t_embedder.mlp.2": (WIDTH, WIDTH), "t_block.1": (WIDTH, WIDTH),
                    "y_embedder.y_proj.fc1": (WIDTH, 9), "y_embedder.y_proj.fc2": (WIDTH, WIDTH),
                    "final_layer.linear": (4, WIDTH)}  # fmt: skip


def ernie_original() -> dict[str, tuple[int, int]]:
    """Modules of ERNIE-Image's original code, which diffusers did not rename -> (outputs, inputs)."""
    inside = {f"self_attention.to_{one}": (WIDTH, WIDTH) for one in ("q", "k", "v", "out.0")}
    inside |= {"mlp.gate_proj": (20, WIDTH), "mlp.up_proj": (20, WIDTH), "mlp.linear_fc2": (WIDTH, 20)}
    return {f"layers.{number}.{name}": size for number in (0, 1) for name, size in inside.items()}


def cogview4_original() -> dict[str, tuple[int, int]]:
    """Modules of CogView4's original code -> (outputs, inputs)."""
    sizes: dict[str, tuple[int, int]] = {}
    for number in (0, 1):
        layer = f"transformer.layers.{number}"
        sizes |= {
            f"{layer}.attention.query_key_value": (3 * WIDTH, WIDTH), f"{layer}.attention.dense": (WIDTH, WIDTH),
            f"{layer}.mlp.dense_h_to_4h": (20, WIDTH), f"{layer}.mlp.dense_4h_to_h": (WIDTH, 20),
            f"mixins.adaln.adaln_modules.{number}.1": (12 * WIDTH, 8),
        }  # fmt: skip
    return sizes | {
        "mixins.patch_embed.proj": (WIDTH, 16), "mixins.patch_embed.text_proj": (WIDTH, 9), "time_embed.0": (8, 8),
        "time_embed.2": (8, 8), "label_emb.0.0": (8, 8), "label_emb.0.2": (8, 8),
        "mixins.final_layer.adaln.1": (2 * WIDTH, 8), "mixins.final_layer.linear": (16, WIDTH),
    }  # fmt: skip


def with_rest(reference: Any, needed: tuple[str, ...]) -> Any:
    """diffusers' converter of whole models on a checkpoint that lacks biases and tables."""

    def convert(checkpoint: Tensors) -> dict[str, Tensor]:
        rest = {key: torch.zeros(2) for key in needed if key not in checkpoint}
        made = reference({**checkpoint, **rest})
        return {key: value for key, value in made.items() if value is not None and value.ndim > 1}

    return convert


def cogview4_converted(checkpoint: Tensors) -> dict[str, Tensor]:
    """The facts of diffusers' script (it is not in the package): joined rows are q, k, v; the last modulation has shift
    before scale."""
    outside = {
        "mixins.patch_embed.proj": "patch_embed.proj", "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "time_embed.0": "time_condition_embed.timestep_embedder.linear_1",
        "time_embed.2": "time_condition_embed.timestep_embedder.linear_2",
        "label_emb.0.0": "time_condition_embed.condition_embedder.linear_1",
        "label_emb.0.2": "time_condition_embed.condition_embedder.linear_2",
        "mixins.final_layer.linear": "proj_out",
    }  # fmt: skip
    made = {f"{new}.weight": checkpoint[f"{old}.weight"] for old, new in outside.items()}
    last = checkpoint["mixins.final_layer.adaln.1.weight"]
    made["norm_out.linear.weight"] = torch.cat([last[WIDTH:], last[:WIDTH]])
    for number in (0, 1):
        old, new = f"transformer.layers.{number}", f"transformer_blocks.{number}"
        joined = checkpoint[f"{old}.attention.query_key_value.weight"]
        for place, one in enumerate("qkv"):
            made[f"{new}.attn1.to_{one}.weight"] = joined[place * WIDTH : (place + 1) * WIDTH]
        made[f"{new}.attn1.to_out.0.weight"] = checkpoint[f"{old}.attention.dense.weight"]
        made[f"{new}.ff.net.0.proj.weight"] = checkpoint[f"{old}.mlp.dense_h_to_4h.weight"]
        made[f"{new}.ff.net.2.weight"] = checkpoint[f"{old}.mlp.dense_4h_to_h.weight"]
        made[f"{new}.norm1.linear.weight"] = checkpoint[f"mixins.adaln.adaln_modules.{number}.1.weight"]
    return made


SANA_REST = (
    "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias",
    "t_block.1.bias", "y_embedder.y_embedding", "y_embedder.y_proj.fc1.bias", "y_embedder.y_proj.fc2.bias",
    "attention_y_norm.weight", "final_layer.linear.bias", "final_layer.scale_shift_table",
    *(f"blocks.{number}.{name}" for number in (0, 1) for name in (
        "scale_shift_table", "attn.proj.bias", "cross_attn.q_linear.bias", "cross_attn.kv_linear.bias",
        "cross_attn.proj.bias", "mlp.inverted_conv.conv.bias", "mlp.depth_conv.conv.weight",
        "mlp.depth_conv.conv.bias")),
)  # fmt: skip
AURAFLOW_REST = ("positional_encoding", "init_x_linear.bias")
AUTHORS: dict[str, tuple[dict[str, Any], Any]] = {
    "auraflow": (auraflow_original(), with_rest(convert_auraflow_transformer_checkpoint_to_diffusers, AURAFLOW_REST)),
    "sana": (sana_original(), with_rest(convert_sana_transformer_to_diffusers, SANA_REST)),
    "cogview4": (cogview4_original(), cogview4_converted),
    "ernie-image": (ernie_original(), convert_ernie_image_transformer_checkpoint_to_diffusers),
}

SPELLINGS: dict[str, tuple[str, bool, str, str]] = {
    "ComfyUI": ("diffusion_model.", False, "lora_A", "lora_B"),
    "ai-toolkit": ("base_model.model.", False, "lora_A", "lora_B"),
    "kohya": ("lora_unet_", True, "lora_down", "lora_up"),
    "LyCORIS": ("lycoris_", True, "lora_down", "lora_up"),
}
"""Prefix of a name, whether dots are lost, names of the two matrices."""


@pytest.mark.parametrize(("family", "written"), [
    (family, written) for family in AUTHORS for written in SPELLINGS
    if written != "ai-toolkit" or family == "ernie-image"
])  # fmt: skip
def test_authors_names_are_what_diffusers_makes_of_whole_models(family: str, written: str, tmp_path: Path) -> None:
    modules, reference = AUTHORS[family]
    prefix, flat, down, up = SPELLINGS[written]
    tensors, checkpoint, dice = {}, {}, torch.Generator().manual_seed(4)
    for module, (out, inside, *kernel) in modules.items():
        A = torch.randn(1, inside, *kernel, generator=dice)
        B = torch.randn(out, 1, *(1 for _ in kernel), generator=dice)
        checkpoint[f"{module}.weight"] = 3 * (B.flatten(1) @ A.flatten(1)).view(out, inside, *kernel)
        name = prefix + (module.replace(".", "_") if flat else module)
        tensors |= {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert facts.adapter(tmp_path / "x.safetensors")["family"] == family
    named = find(family).named(read(tmp_path / "x.safetensors"), None).parts["transformer"]
    wanted = {key.removesuffix(".weight").replace(".", "_"): value for key, value in reference(checkpoint).items()}
    assert {name.replace(".", "_") for name in named} == set(wanted)
    for module, layer in named.items():
        torch.testing.assert_close(layer.delta(), wanted[module.replace(".", "_")])


@pytest.mark.parametrize("family", AUTHORS)
def test_lokr_in_authors_names_is_its_kronecker_product(family: str, tmp_path: Path) -> None:
    modules, reference = AUTHORS[family]
    tensors, checkpoint, dice = {}, {}, torch.Generator().manual_seed(5)
    for module, (out, inside, *kernel) in modules.items():
        if kernel or inside % 2:
            continue
        one = torch.randn(2, 2, generator=dice)
        two = torch.randn(out // 2, inside // 2, generator=dice)
        name = f"lycoris_{module.replace('.', '_')}"
        tensors |= {f"{name}.lokr_w1": one, f"{name}.lokr_w2": two, f"{name}.alpha": torch.tensor(1.0)}
        checkpoint[f"{module}.weight"] = torch.kron(one, two)
    save_file(tensors, tmp_path / "x.safetensors")
    named = find(family).named(read(tmp_path / "x.safetensors"), None).parts["transformer"]
    rest = {f"{module}.weight": torch.zeros(size) for module, size in modules.items()}
    wanted = {key.removesuffix(".weight").replace(".", "_"): v for key, v in reference({**rest, **checkpoint}).items()}
    assert named
    for module, layer in named.items():
        torch.testing.assert_close(layer.delta(), wanted[module.replace(".", "_")], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", AUTHORS)
def test_rows_that_cannot_be_split_and_unknown_names_are_refused(family: str, tmp_path: Path) -> None:
    joined = next((module for module in AUTHORS[family][0] if re.search("qkv$|query_key_value$", module)), "")
    if joined:
        name = f"diffusion_model.{joined}"
        save_file({f"{name}.lora_A.weight": torch.zeros(1, 8), f"{name}.lora_B.weight": torch.zeros(23, 1)},
                  tmp_path / "x.safetensors")  # fmt: skip
        with pytest.raises(InputError, match="joins q, k and v, but 23 rows for 8 inputs"):
            find(family).named(read(tmp_path / "x.safetensors"), None)
    strange = next(iter(AUTHORS[family][0])).replace(".0.", ".0.strange_")
    save_file({f"diffusion_model.{strange}.lora_A.weight": torch.zeros(1, 8),
               f"diffusion_model.{strange}.lora_B.weight": torch.zeros(8, 1)}, tmp_path / "y.safetensors")  # fmt: skip
    with pytest.raises(FamilyError, match="strange"):
        MultiLoRAPipeline(tiny.FAMILIES[family]()).load_lora(tmp_path / "y.safetensors")


def test_peft_names_without_their_configuration_are_refused(tmp_path: Path) -> None:
    """Its alpha would be unknown."""
    name = "base_model.model.double_layers.0.attn.w2q"
    save_file({f"{name}.lora_A.weight": torch.zeros(1, 8), f"{name}.lora_B.weight": torch.zeros(8, 1)},
              tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(InputError, match="which holds its alpha, is missing"):
        read(tmp_path / "x.safetensors")


CHROMA = {
    "double_blocks_0_img_attn_qkv": 3, "double_blocks_0_txt_attn_qkv": 3, "double_blocks_0_img_attn_proj": 1,
    "double_blocks_0_txt_attn_proj": 1, "double_blocks_0_img_mlp_0": 4, "double_blocks_0_txt_mlp_0": 4,
    "single_blocks_0_linear1": 7,
}  # fmt: skip
"""Modules of Chroma that kohya adapts -> outputs, in widths of 3072 (diffusers' converter knows no other width)."""


@pytest.mark.parametrize("written", ["kohya", "ComfyUI"])
def test_chroma_in_kohyas_names_is_what_diffusers_makes_of_it(written: str, tmp_path: Path) -> None:
    tensors, flat, dice = {}, {}, torch.Generator().manual_seed(6)
    for module, count in CHROMA.items():
        A, B = torch.randn(2, 3072, generator=dice), torch.randn(3072 * count, 2, generator=dice)
        flat |= {f"lora_unet_{module}.lora_down.weight": A, f"lora_unet_{module}.lora_up.weight": B,
                 f"lora_unet_{module}.alpha": torch.tensor(3.0)}  # fmt: skip
        name = "lora_unet_" + module
        if written == "ComfyUI":
            dotted = re.sub(r"^(double|single)_blocks_(\d+)_", r"\1_blocks.\2.", module)
            name = "diffusion_model." + re.sub(r"(img|txt)_(attn|mlp)_", r"\1_\2.", dotted)
        roles = ("lora_A", "lora_B") if written == "ComfyUI" else ("lora_down", "lora_up")
        tensors |= {f"{name}.{roles[0]}.weight": A, f"{name}.{roles[1]}.weight": B, f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"modelspec.architecture": "chroma/lora"})
    assert facts.adapter(tmp_path / "x.safetensors")["family"] == "chroma"
    wanted = converters._convert_kohya_flux_lora_to_diffusers(dict(flat))
    layers = find("chroma").named(read(tmp_path / "x.safetensors"), None).parts["transformer"]
    assert {f"transformer.{name}" for name in layers} == {key.split(".lora_")[0] for key in wanted}
    probe = torch.randn(3072, generator=dice)
    for name, layer in layers.items():
        A, B = (wanted[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(layer.scale * layer.B @ (layer.A @ probe), B @ (A @ probe), rtol=1e-4, atol=1e-2)


def test_chromas_network_for_modulations_is_read_where_diffusers_refuses(tmp_path: Path) -> None:
    pipe, tensors, dice = tiny.FAMILIES["chroma"](), {}, torch.Generator().manual_seed(6)
    names = {"distilled_guidance_layer_in_proj": "distilled_guidance_layer.in_proj",
             "distilled_guidance_layer_layers_0_in_layer": "distilled_guidance_layer.layers.0.linear_1",
             "single_blocks_1_linear2": "single_transformer_blocks.1.proj_out"}  # fmt: skip
    for written, module in names.items():
        layer = pipe.transformer.get_submodule(module)
        tensors[f"lora_unet_{written}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=dice)
        tensors[f"lora_unet_{written}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=dice)
    save_file(tensors, tmp_path / "x.safetensors")
    assert facts.adapter(tmp_path / "x.safetensors")["family"] == "chroma"
    with pytest.raises(ValueError, match="Incompatible keys"):
        converters._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    composer = MultiLoRAPipeline(pipe)
    composer.load_lora(tmp_path / "x.safetensors")
    found = updates(composer)
    assert set(found) == set(names.values())
    for written, module in names.items():
        down, up = (tensors[f"lora_unet_{written}.lora_{side}.weight"] for side in ("down", "up"))
        torch.testing.assert_close(found[module], up @ down)


def test_an_adapter_of_flux_with_modulations_is_refused_on_chroma(tmp_path: Path) -> None:
    tensors = {}
    for name, out in (("double_blocks_0_img_mod_lin", 96), ("single_blocks_0_linear2", 16)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.zeros(1, 16)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.zeros(out, 1)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FamilyError, match="adapter for Flux, but this base is Chroma"):
        MultiLoRAPipeline(tiny.FAMILIES["chroma"]()).load_lora(tmp_path / "x.safetensors")


def whole_checkpoint(family: str, state: Tensors) -> Tensors:
    """``state`` of a tiny transformer in its authors' names: the inverse of diffusers' converter, which is found by
    running it on numbers."""
    modules = sorted(name for name in AUTHORS[family][0] if not name.startswith("single_layers.1"))
    keys = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    keys += [*SANA_REST, "positional_encoding", "register_tokens", "init_x_linear.bias"]
    numbers = {key: torch.full((6, 1), float(number)) for number, key in enumerate(dict.fromkeys(keys))}
    convert = {"auraflow": convert_auraflow_transformer_checkpoint_to_diffusers,
               "sana": convert_sana_transformer_to_diffusers}[family]  # fmt: skip
    made: dict[str, list[Tensor]] = {}
    found = {name: value for name, value in convert(dict(numbers)).items() if value is not None and name in state}
    assert set(found) == set(state)
    for name, value in found.items():
        tensor = state[name]
        if name.startswith("norm_out.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        made.setdefault(list(numbers)[int(value.flatten()[0])], []).append(tensor)
    unused = {key: torch.zeros(1) for key in ("pos_embed", "y_embedder.y_embedding") if family == "sana"}
    return unused | {key: torch.cat(parts) if len(parts) > 1 else parts[0].clone() for key, parts in made.items()}


@pytest.mark.parametrize("family", ["auraflow", "sana", "ernie-image"])
def test_a_checkpoint_in_authors_names_replaces_the_denoiser(family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    state = dict(tiny.FAMILIES[family](1).transformer.state_dict())
    if family == "ernie-image":
        written = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    else:
        written = whole_checkpoint(family, state)
    save_file(written, tmp_path / "x.safetensors")
    assert detect(tmp_path / "x.safetensors").name == family
    place = tmp_path / f"tiny-{family}-0"
    composer = MultiLoRAPipeline.from_pretrained(place, device="cpu", denoiser=tmp_path / "x.safetensors")
    for name, tensor in composer.pipe.transformer.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
