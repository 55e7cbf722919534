"""Files as other programs write them load to the update those programs mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.errors import InputError
from adapters.formats import LoraFile, read
from adapters.formats.fit import fit
from tests import tiny
from tests.adapters.test_formats import Toy

Tensors = dict[str, Tensor]
LINEAR, CONV, POINT = "down_blocks_0_attn1_to_q", "down_blocks_0_conv", "down_blocks_0_proj"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def loaded(tensors: Tensors, folder: Path, models: dict[str, nn.Module] | None = None) -> LoraFile:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "f.safetensors")
    return fit(read(folder / "f.safetensors"), models or {"unet": Toy()})


def delta(file: LoraFile, module: str, component: str = "unet") -> Tensor:
    return file.parts[component][module].delta()


# LyCORIS and kohya


def test_locon_with_a_core_is_three_convolutions(tmp_path: Path) -> None:
    down, mid, up = rand(2, 3, 1, 1), rand(2, 2, 3, 3), rand(5, 2, 1, 1)
    name = f"lora_unet_{CONV}"
    tensors = {
        f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    made = delta(loaded(tensors, tmp_path), "down_blocks.0.conv")
    x = rand(1, 3, 6, 7)
    conv = nn.functional.conv2d
    torch.testing.assert_close(conv(x, made, padding=1), 0.5 * conv(conv(conv(x, down), mid, padding=1), up))


@pytest.mark.parametrize("rank", [1, 3])  # 1: factored, 3: the rank 9 exceeds the layer's, whole matrix
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_loha_is_the_elementwise_product(module: str, rank: int, tmp_path: Path) -> None:
    shape = (4, 6) if module == LINEAR else (5, 3, 3, 3)
    columns = torch.Size(shape[1:]).numel()
    a, b = rand(shape[0], rank), rand(rank, columns)
    c, d = rand(shape[0], rank, seed=1), rand(rank, columns, seed=1)
    tensors = {
        f"lora_unet_{module}.hada_w1_a": a, f"lora_unet_{module}.hada_w1_b": b,
        f"lora_unet_{module}.hada_w2_a": c, f"lora_unet_{module}.hada_w2_b": d,
        f"lora_unet_{module}.alpha": torch.tensor(0.5),
    }  # fmt: skip
    file = loaded(tensors, tmp_path)
    (_, _, layer), *_ = file.layers()
    torch.testing.assert_close(layer.delta(), (0.5 / rank * (a @ b) * (c @ d)).reshape(shape))
    assert layer.rank <= min(shape[0], columns)


def test_loha_with_cores(tmp_path: Path) -> None:
    name = f"lora_unet_{CONV}"
    parts = {f"hada_w{i}_a": rand(2, 5, seed=i) for i in (1, 2)} | {f"hada_w{i}_b": rand(2, 3, seed=i) for i in (1, 2)}
    parts |= {f"hada_t{i}": rand(2, 2, 3, 3, seed=i) for i in (1, 2)}
    file = loaded({f"{name}.{key}": value for key, value in parts.items()}, tmp_path)
    expected = torch.ones(5, 3, 3, 3)
    for i in (1, 2):
        product = torch.zeros(5, 3, 3, 3)
        for j in range(2):
            for k in range(2):
                outer = parts[f"hada_w{i}_a"][j][:, None] * parts[f"hada_w{i}_b"][k][None, :]
                product += outer[:, :, None, None] * parts[f"hada_t{i}"][j, k]
        expected = expected * product
    torch.testing.assert_close(delta(file, "down_blocks.0.conv"), expected)


LOKR = {
    "whole": {"lokr_w1": (2, 3), "lokr_w2": (2, 2)},
    "second factored": {"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)},
    "both factored": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)},
}


@pytest.mark.parametrize("kind", list(LOKR))
def test_lokr_is_the_kronecker_product(kind: str, tmp_path: Path) -> None:
    parts = {key: rand(*shape) for key, shape in LOKR[kind].items()}
    tensors = {f"lora_unet_{LINEAR}.{key}": value for key, value in parts.items()}
    file = loaded(tensors | {f"lora_unet_{LINEAR}.alpha": torch.tensor(3.0)}, tmp_path)
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    scale = 1.0 if kind == "whole" else 3.0  # nothing factored: no rank, and LyCORIS scales by 1
    torch.testing.assert_close(delta(file, "down_blocks.0.attn1.to_q"), scale * torch.kron(first, second))


@pytest.mark.parametrize("kernel_of", ["whole", "flat", "core"])
def test_lokr_of_a_convolution(kernel_of: str, tmp_path: Path) -> None:
    first = rand(5, 1)
    parts: Tensors = {"lokr_w1": first}
    if kernel_of == "whole":
        parts["lokr_w2"] = second = rand(1, 3, 3, 3)
    elif kernel_of == "flat":
        parts |= {"lokr_w2_a": rand(1, 2), "lokr_w2_b": rand(2, 27)}
        second = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(1, 3, 3, 3)
    else:
        parts |= {"lokr_w2_a": rand(2, 1), "lokr_w2_b": rand(2, 3), "lokr_t2": rand(2, 2, 3, 3)}
        second = torch.einsum("ijhw,io,jn->onhw", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    file = loaded({f"lora_unet_{CONV}.{key}": value for key, value in parts.items()}, tmp_path)
    expected = torch.kron(first[:, :, None, None], second)
    torch.testing.assert_close(delta(file, "down_blocks.0.conv"), expected)


@pytest.mark.parametrize("module", [LINEAR, CONV, POINT])
def test_a_whole_difference(module: str, tmp_path: Path) -> None:
    wanted = {LINEAR: (4, 6), CONV: (5, 3, 3, 3), POINT: (6, 5, 1, 1)}[module]
    tensors = {f"lora_unet_{module}.diff": rand(*wanted), f"lora_unet_{module}.diff_b": torch.zeros(wanted[0])}
    (_, _, layer), *_ = loaded(tensors, tmp_path).layers()
    torch.testing.assert_close(layer.delta(), tensors[f"lora_unet_{module}.diff"])


@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
@pytest.mark.parametrize("factor", [-1, 2])
def test_lycoris_directories_of_peft(method: str, factor: int, tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    common: dict[str, Any] = {"r": 2, "alpha": 3, "target_modules": ["to_q", "conv"], "init_weights": False}
    config = LoHaConfig(**common) if method == "LoHa" else LoKrConfig(**common, decompose_factor=factor)
    torch.manual_seed(0)
    model = get_peft_model(Toy(), config)
    for name, parameter in model.named_parameters():
        if "hada" in name or "lokr" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    file = fit(read(tmp_path), {"unet": Toy()})
    assert file.counts() == {"unet": 2}
    for name, ours in file.parts["unet"].items():
        theirs = model.base_model.model.get_submodule(name)
        scale = theirs.scaling["default"]
        wanted = theirs.get_delta_weight("default")
        assert scale == 1.5
        torch.testing.assert_close(ours.delta(), wanted)


def test_kohya_dora_keeps_its_magnitude_and_refuses_one_per_input(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attn1_to_out_0"  # (6, 4)
    tensors = {f"{name}.lora_down.weight": rand(2, 4), f"{name}.lora_up.weight": rand(6, 2)}
    file = loaded(tensors | {f"{name}.dora_scale": rand(6, 1).abs()}, tmp_path)
    magnitude = file.parts["unet"]["down_blocks.0.attn1.to_out.0"].magnitude
    assert magnitude is not None
    torch.testing.assert_close(magnitude, rand(6, 1).abs().flatten())
    with pytest.raises(InputError, match="per input"):
        loaded(tensors | {f"{name}.dora_scale": rand(1, 4).abs()}, tmp_path)


def test_the_magnitude_per_input_of_a_square_layer_is_refused_too(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0"
    square = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.Linear(4, 4)])})
    tensors = {f"{name}.lora_down.weight": rand(2, 4), f"{name}.lora_up.weight": rand(4, 2)}
    with pytest.raises(InputError, match="per input"):
        loaded(tensors | {f"{name}.dora_scale": rand(1, 4)}, tmp_path, {"unet": square})


def test_a_magnitude_under_a_dotted_name_belongs_to_its_flat_layer(tmp_path: Path) -> None:
    """diffusers' DoRA script writes A and B under webui's flat names, and the magnitude with some dots left."""
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
    tensors = {
        f"{block}_to_q.lora_down.weight": rand(2, 6), f"{block}_to_q.lora_up.weight": rand(5, 2, seed=1),
        f"{block}.to_q.lora_magnitude_vector": rand(5, seed=2).abs(),
    }  # fmt: skip
    file = read_only(tensors, tmp_path)
    ((_, name, layer),) = file.layers()
    assert name == "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert layer.magnitude is not None
    assert torch.equal(layer.magnitude, tensors[f"{block}.to_q.lora_magnitude_vector"])


def test_numbers_of_eight_bits_are_read(tmp_path: Path) -> None:
    A, B = rand(2, 6).to(torch.float8_e4m3fn), rand(4, 2).to(torch.float8_e4m3fn)
    file = loaded({f"lora_unet_{LINEAR}.lora_down.weight": A, f"lora_unet_{LINEAR}.lora_up.weight": B}, tmp_path)
    torch.testing.assert_close(delta(file, "down_blocks.0.attn1.to_q"), B.float() @ A.float())


def test_comfyui_and_lycoris_prefixes(tmp_path: Path) -> None:
    A, B = rand(2, 6), rand(4, 2)
    for prefix, dots in (("diffusion_model.", True), ("lycoris_", False)):
        name = prefix + ("down_blocks.0.attn1.to_q" if dots else LINEAR)
        file = loaded({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, tmp_path)
        torch.testing.assert_close(delta(file, "down_blocks.0.attn1.to_q"), B @ A)


# Flux: kohya, ComfyUI, XLabs, fal, OneTrainer, ai-toolkit; diffusers' own converters are the reference

HIDDEN, MLP = 3072, 12288
FLUX = {
    "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.img_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.0.img_mlp.0": (MLP, HIDDEN),
    "double_blocks.0.img_mlp.2": (HIDDEN, MLP),
    "double_blocks.0.img_mod.lin": (6 * HIDDEN, HIDDEN),
    "double_blocks.0.txt_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.txt_attn.proj": (HIDDEN, HIDDEN),
    "double_blocks.0.txt_mlp.0": (MLP, HIDDEN),
    "double_blocks.0.txt_mlp.2": (HIDDEN, MLP),
    "double_blocks.0.txt_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.11.linear1": (3 * HIDDEN + MLP, HIDDEN),
    "single_blocks.11.linear2": (HIDDEN, HIDDEN + MLP),
    "single_blocks.11.modulation.lin": (3 * HIDDEN, HIDDEN),
    "img_in": (HIDDEN, 64),
    "txt_in": (HIDDEN, 4096),
    "time_in.in_layer": (HIDDEN, 256),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.in_layer": (HIDDEN, 256),
    "final_layer.linear": (64, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}


def flux_kohya(rank: int = 2) -> Tensors:
    tensors = {}
    for number, (module, (out, inside)) in enumerate(FLUX.items()):
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = rand(rank, inside, seed=number)
        tensors[f"{name}.lora_up.weight"] = rand(out, rank, seed=number)
        if "final_layer" not in name:  # diffusers' converter drops the alpha of these
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def read_only(tensors: Tensors, folder: Path) -> LoraFile:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "f.safetensors")
    return read(folder / "f.safetensors")


def same_as_diffusers(file: LoraFile, reference: Tensors) -> None:
    """Every layer of the reference, and no other, with the same product on a random input."""
    modules = {key.removeprefix("transformer.").partition(".lora_")[0]: key for key in reference if ".lora_A" in key}
    ours = file.parts["transformer"]
    assert not file.flat
    assert set(modules) == set(ours)
    for name, key in modules.items():
        layer = ours[name]
        A, B = reference[key], reference[key.replace("lora_A", "lora_B")]
        x = rand(A.shape[1])
        torch.testing.assert_close(layer.scale * (layer.B @ (layer.A @ x)), B @ (A @ x), rtol=1e-4, atol=1e-3)


def test_flux_of_kohya(tmp_path: Path) -> None:
    tensors = flux_kohya()
    same_as_diffusers(read_only(tensors, tmp_path), converters._convert_kohya_flux_lora_to_diffusers(dict(tensors)))


def test_flux_of_kohya_with_one_lora_per_part(tmp_path: Path) -> None:
    """sd-scripts' split_qkv writes a block-diagonal B; every part gets its own rank back."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    B = torch.zeros(3 * HIDDEN, 6)
    for part in range(3):
        B[part * HIDDEN : (part + 1) * HIDDEN, 2 * part : 2 * part + 2] = rand(HIDDEN, 2, seed=part)
    tensors = {
        f"{name}.lora_down.weight": rand(6, HIDDEN),
        f"{name}.lora_up.weight": B,
        f"{name}.alpha": torch.tensor(3.0),
    }
    file = read_only(tensors, tmp_path)
    assert file.ranks() == (2,)
    same_as_diffusers(file, converters._convert_kohya_flux_lora_to_diffusers(dict(tensors)))


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("diffusion_model.", "lora_A", "lora_B"),
        ("diffusion_model.", "lora_down", "lora_up"),
        ("base_model.model.", "lora_A", "lora_B"),
        ("", "lora_A", "lora_B"),
    ],
    ids=["ai-toolkit for ComfyUI", "ComfyUI", "fal", "BFL"],
)
def test_flux_in_the_original_names(prefix: str, down: str, up: str, tmp_path: Path) -> None:
    inside = {module: shape for module, shape in FLUX.items() if "blocks" in module} if not prefix else FLUX
    kohya = {key: value for key, value in flux_kohya().items() if not key.endswith("alpha")}
    tensors = {}
    for module in inside:
        flat = "lora_unet_" + module.replace(".", "_")
        tensors[f"{prefix}{module}.{down}.weight"] = kohya[f"{flat}.lora_down.weight"]
        tensors[f"{prefix}{module}.{up}.weight"] = kohya[f"{flat}.lora_up.weight"]
    wanted = {key: value for key, value in kohya.items() if prefix or "blocks" in key}
    same_as_diffusers(read_only(tensors, tmp_path), converters._convert_kohya_flux_lora_to_diffusers(wanted))


def test_flux_of_xlabs(tmp_path: Path) -> None:
    shapes = {
        "double_blocks.3.processor.qkv_lora1": (3 * HIDDEN, HIDDEN),
        "double_blocks.3.processor.qkv_lora2": (3 * HIDDEN, HIDDEN),
        "double_blocks.3.processor.proj_lora1": (HIDDEN, HIDDEN),
        "double_blocks.3.processor.proj_lora2": (HIDDEN, HIDDEN),
        "single_blocks.5.processor.qkv_lora": (3 * HIDDEN, HIDDEN),
        "single_blocks.5.processor.proj_lora": (HIDDEN, HIDDEN + MLP),
    }
    tensors = {}
    for number, (name, (out, inside)) in enumerate(shapes.items()):
        tensors[f"{name}.down.weight"] = rand(2, inside, seed=number)
        tensors[f"{name}.up.weight"] = rand(out, 2, seed=number)
    for prefix in ("", "diffusion_model."):
        given = {prefix + key: value for key, value in tensors.items()}
        same_as_diffusers(read_only(given, tmp_path), converters._convert_xlabs_flux_lora_to_diffusers(dict(given)))


@pytest.mark.parametrize("names", ["kohya", "OneTrainer", "ai-toolkit"])
def test_flux_files_fit_the_model_with_their_text_encoders(names: str, tmp_path: Path) -> None:
    pipe = tiny.flux()
    parts = ("transformer", "text_encoder", "text_encoder_2")
    models = {name: getattr(pipe, name) for name in parts}
    if names == "kohya":
        tensors = {
            "lora_unet_single_blocks_1_linear1.lora_down.weight": rand(2, 16),
            "lora_unet_single_blocks_1_linear1.lora_up.weight": rand(3 * 16 + 64, 2),
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": rand(2, 16),
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": rand(16, 2),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": rand(2, 32),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": rand(16, 2),
        }
        counts = {"transformer": 4, "text_encoder": 1, "text_encoder_2": 1}
    else:
        name = "transformer.single_transformer_blocks.0.attn.to_q"
        name = name if names == "ai-toolkit" else "lora_" + name.replace(".", "_")
        tensors = {f"{name}.lora_down.weight": rand(2, 16), f"{name}.lora_up.weight": rand(16, 2)}
        counts = {"transformer": 1}
    assert loaded(tensors, tmp_path, models).counts() == counts


# Flux.2


def flux2_original(hidden: int = 16) -> dict[str, tuple[int, int]]:
    """Modules in the original names that fit the tiny model, and their shapes."""
    shapes = {
        "img_in": (hidden, 16),
        "txt_in": (hidden, 24),
        "time_in.in_layer": (hidden, 16),
        "guidance_in.out_layer": (hidden, hidden),
        "double_stream_modulation_img.lin": (6 * hidden, hidden),
        "single_stream_modulation.lin": (3 * hidden, hidden),
        "single_blocks.1.linear1": (9 * hidden, hidden),
        "single_blocks.1.linear2": (hidden, 4 * hidden),
        "final_layer.linear": (16, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for side in ("img", "txt"):
        shapes |= {
            f"double_blocks.0.{side}_attn.qkv": (3 * hidden, hidden),
            f"double_blocks.0.{side}_attn.proj": (hidden, hidden),
            f"double_blocks.0.{side}_mlp.0": (6 * hidden, hidden),
            f"double_blocks.0.{side}_mlp.2": (hidden, 3 * hidden),
        }
    return shapes


FLUX2_SPELLINGS = {
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
    "ai-toolkit": ("diffusion_model.", "lora_A", "lora_B"),
    "ComfyUI": ("diffusion_model.", "lora_down", "lora_up"),
    "PEFT": ("base_model.model.", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("names", FLUX2_SPELLINGS)
def test_flux2_against_diffusers_converter_of_whole_models(names: str, tmp_path: Path) -> None:
    """Every module; diffusers' own converter of adapters knows most of them, and is compared below."""
    prefix, down, up = FLUX2_SPELLINGS[names]
    tensors: Tensors = {}
    checkpoint: Tensors = {}
    for number, (module, (out, inside)) in enumerate(flux2_original().items()):
        A, B = rand(2, inside, seed=number), rand(out, 2, seed=number)
        name = prefix + (module.replace(".", "_") if names == "kohya" else module)
        tensors |= {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B}
        if names == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        checkpoint[f"{module}.weight"] = (0.5 if names == "kohya" else 1.0) * B @ A
    reference = convert_flux2_transformer_checkpoint_to_diffusers(checkpoint)
    made = loaded(tensors, tmp_path, {"transformer": tiny.FAMILIES["flux2"]().transformer}).parts["transformer"]
    assert {f"{name}.weight" for name in made} == set(reference)
    for name, layer in made.items():
        torch.testing.assert_close(layer.delta(), reference[f"{name}.weight"])


@pytest.mark.parametrize("names", FLUX2_SPELLINGS)
def test_flux2_against_diffusers_converter_of_adapters(names: str, tmp_path: Path) -> None:
    """What that converter knows, except the last modulation, whose halves it does not exchange; ComfyUI's names with
    down and up it drops altogether."""
    prefix, down, up = FLUX2_SPELLINGS[names]
    tensors: Tensors = {}
    for number, (module, (out, inside)) in enumerate(flux2_original().items()):
        if "adaLN" in module or (names == "kohya" and ("modulation" in module or "guidance" in module)):
            continue
        name = prefix + (module.replace(".", "_") if names == "kohya" else module)
        tensors |= {
            f"{name}.{down}.weight": rand(2, inside, seed=number),
            f"{name}.{up}.weight": rand(out, 2, seed=number),
        }
    pipe: Any = Flux2Pipeline
    reference = pipe.lora_state_dict(dict(tensors))
    if names == "ComfyUI":
        assert not reference
        return
    same_as_diffusers(read_only(tensors, tmp_path), reference)


@pytest.mark.parametrize("names", ["diffusion_model.", "lycoris_"])
def test_lokr_of_flux2(names: str, tmp_path: Path) -> None:
    """ai-toolkit's LoKr on joined q, k and v is cut into three layers, which diffusers joins instead; LyCORIS has
    diffusers' own modules."""
    model = tiny.FAMILIES["flux2"]().transformer
    original = flux2_original() if names == "diffusion_model." else {
        name: tuple(module.weight.shape) for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks" in name
    }  # fmt: skip
    tensors: Tensors = {}
    whole: Tensors = {}
    for number, (module, (out, inside)) in enumerate(original.items()):
        name = names + (module if names == "diffusion_model." else module.replace(".", "_"))
        w1, a, b = rand(4, 4, seed=number), rand(out // 4, 2, seed=number), rand(2, inside // 4, seed=number)
        tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        whole[f"{module}.weight"] = 0.5 * torch.kron(w1, a @ b)
    reference = convert_flux2_transformer_checkpoint_to_diffusers(whole) if names == "diffusion_model." else whole
    made = loaded(tensors, tmp_path, {"transformer": model}).parts["transformer"]
    assert {f"{name}.weight" for name in made} == set(reference)
    for name, layer in made.items():
        torch.testing.assert_close(layer.delta(), reference[f"{name}.weight"])


@pytest.mark.parametrize("names", ["transformer_blocks", "sformer_blocks"])
def test_diffusers_modules_behind_comfyuis_prefix(names: str, tmp_path: Path) -> None:
    name = f"diffusion_model.{names}.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": rand(2, 16), f"{name}.lora_B.weight": rand(16, 2)}
    file = loaded(tensors, tmp_path, {"transformer": tiny.FAMILIES["flux2"]().transformer})
    assert list(file.parts["transformer"]) == ["transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize("module", ["double_blocks.0.img_mod.lin", "vector_in.in_layer"])
def test_modules_that_flux2_does_not_have(module: str, tmp_path: Path) -> None:
    known = {"single_blocks.1.linear1": (9 * 16, 16), module: (96, 16)}
    tensors: Tensors = {}
    for name, (out, inside) in known.items():
        tensors |= {f"diffusion_model.{name}.lora_A.weight": rand(2, inside),
                    f"diffusion_model.{name}.lora_B.weight": rand(out, 2)}  # fmt: skip
    with pytest.raises(InputError, match=r"Flux\.2 has no module"):
        read_only(tensors, tmp_path)


# SD3


def sd3_original(hidden: int = 16) -> dict[str, tuple[int, int]]:
    """Linear layers of a two-block SD3.5 in the original names, dual attention in the first block."""
    shapes = {
        "x_embedder.proj": (hidden, 16), "context_embedder": (hidden, 32),
        "t_embedder.mlp.0": (hidden, 256), "t_embedder.mlp.2": (hidden, hidden),
        "y_embedder.mlp.0": (hidden, 32), "y_embedder.mlp.2": (hidden, hidden),
        "final_layer.linear": (16, hidden), "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }  # fmt: skip
    for block in range(2):
        for side in ("x_block", "context_block"):
            last = block == 1 and side == "context_block"
            name = f"joint_blocks.{block}.{side}"
            chunks = 2 if last else 9 if side == "x_block" and block == 0 else 6
            shapes[f"{name}.adaLN_modulation.1"] = (chunks * hidden, hidden)
            shapes[f"{name}.attn.qkv"] = (3 * hidden, hidden)
            if not last:
                shapes[f"{name}.attn.proj"] = (hidden, hidden)
                shapes[f"{name}.mlp.fc1"] = (4 * hidden, hidden)
                shapes[f"{name}.mlp.fc2"] = (hidden, 4 * hidden)
    shapes["joint_blocks.0.x_block.attn2.qkv"] = (3 * hidden, hidden)
    shapes["joint_blocks.0.x_block.attn2.proj"] = (hidden, hidden)
    return shapes


@pytest.mark.parametrize("names", ["kohya", "ComfyUI"])
def test_sd3_against_diffusers_converter_of_whole_models(names: str, tmp_path: Path) -> None:
    """The updates as a checkpoint of their own, through diffusers' converter of SD3 checkpoints."""
    tensors, checkpoint = {}, {"pos_embed": torch.zeros(1, 4, 16)}
    for number, (module, (out, inside)) in enumerate(sd3_original().items()):
        A, B = rand(2, inside, seed=number), rand(out, 2, seed=number)
        checkpoint[f"{module}.weight"], checkpoint[f"{module}.bias"] = 0.5 * B @ A, torch.zeros(out)
        if module == "x_embedder.proj":  # a convolution over patches
            A = A.reshape(2, 4, 2, 2)
        if names == "kohya":
            name, down, up = "lora_unet_" + module.replace(".", "_"), "lora_down", "lora_up"
        else:
            name, down, up = f"diffusion_model.{module}", "lora_A", "lora_B"
        tensors |= {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B, f"{name}.alpha": torch.tensor(1.0)}
    reference = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    file = read_only(tensors, tmp_path)
    ours = file.parts["transformer"]
    wanted = {
        key.removesuffix(".weight"): value
        for key, value in reference.items()
        if key.endswith(".weight") and value.ndim == 2
    }
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name].delta().flatten(1), value)


def test_sd3_of_kohya_fits_the_model(tmp_path: Path) -> None:
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {f"{name}.lora_down.weight": rand(2, 16), f"{name}.lora_up.weight": rand(48, 2)}
    file = loaded(tensors, tmp_path, {"transformer": tiny.sd3().transformer})
    assert sorted(file.parts["transformer"]) == [f"transformer_blocks.0.attn.to_{part}" for part in "kqv"]


# Refusals


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"lora_unet_{LINEAR}.hada_w1_a": rand(4, 2)}, "LoHa layer .* has no"),
        ({f"lora_unet_{LINEAR}.lokr_w1": rand(2, 2)}, "LoKr layer .* has no"),
        ({f"lora_unet_{LINEAR}.diff": rand(4)}, "only the weights"),
        ({f"lora_unet_{LINEAR}.diff": rand(4, 6), f"lora_unet_{LINEAR}.diff_b": rand(4)}, "not understood"),
        ({f"lora_unet_{LINEAR}.diff": rand(4, 6), f"lora_unet_{LINEAR}.lokr_w1": rand(2, 2)}, "more than one kind"),
        ({f"lora_unet_{LINEAR}.lokr_w1": rand(9000, 1), f"lora_unet_{LINEAR}.lokr_w2": rand(9000, 9)}, "larger"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.diff": rand(7, 4)}, "joins 3 layers"),
        ({"lora_unet_double_blocks_0_strange.diff": rand(6, 4)}, "neither SD3 nor Flux"),
        ({f"lora_unet_{LINEAR}.diff": rand(4, 6), f"lora_unet_{LINEAR}.alpha": torch.ones(2)}, "not one number"),
        ({f"lora_unet_{LINEAR}.diff": torch.ones(4, 6, dtype=torch.int8)}, "floating point"),
    ],
)  # fmt: skip
def test_damaged_layers_are_refused(tensors: Tensors, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        loaded(tensors, tmp_path)


def test_a_pattern_that_takes_forever_is_refused(tmp_path: Path) -> None:
    from adapters.formats import LoraLayer, write_peft

    write_peft(LoraFile({"unet": {"down_blocks.0.attn1.to_q": LoraLayer(rand(2, 6), rand(4, 2), 2.0)}}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"(a+)+b": 1}}))
    with pytest.raises(InputError, match="take forever"):
        read(tmp_path)


def test_a_pickle_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    torch.save({"lora_unet_x.diff": torch.ones(1).expand(100_000, 100_000)}, tmp_path / "big.pt")
    with pytest.raises(InputError, match="not stored in the file"):
        read(tmp_path / "big.pt")


def test_a_file_without_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_bytes(b"x")
    with pytest.raises(InputError, match="has no suffix"):
        read(tmp_path / "adapter")
