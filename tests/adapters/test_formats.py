"""Adapter files: every format gives back the same update of the weights; what is wrong is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adapters.errors import FamilyError, InputError
from adapters.formats import LoraFile, LoraLayer, read, write_diffusers, write_kohya, write_peft
from adapters.formats.fit import fit
from adapters.formats.keys import FOREIGN, modern_name
from adapters.formats.peft_config import config_of
from tests import tiny

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def by_tensors_alone(path: Path) -> dict[str, torch.Tensor]:
    """The updates for a reader that knows A, B and .alpha, and no text: without .alpha the scale is 1."""
    tensors, found = load_file(path), {}
    for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")):
        for key in [key for key in tensors if key.endswith(down)]:
            name = key.removesuffix(down)
            A, B = tensors[key].flatten(1), tensors[name + up].flatten(1)
            alpha = tensors.get(f"{name}.alpha")
            module = name.removeprefix("lora_unet_").removeprefix("unet.").replace(".", "_")
            found[module] = (1.0 if alpha is None else float(alpha) / len(A)) * (B @ A)
    return found


@pytest.mark.parametrize("write", [write_diffusers, write_kohya])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_readers_of_tensors_alone_get_the_same_update(write: Any, rslora: bool, dtype: Any, tmp_path: Path) -> None:
    """Of whatever alpha; what diffusers makes of text and tensors is tested in pipelines and training."""
    parts = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        one = layer(shape, number + 2, 0.7 * number + 1, number, rslora=rslora)
        parts[name] = replace(one, A=one.A.to(dtype), B=one.B.to(dtype))
    path = write(LoraFile({"unet": parts}), tmp_path / "a.safetensors")
    found = by_tensors_alone(path)
    assert set(found) == {name.replace(".", "_") for name in parts}
    for name, one in parts.items():
        wanted = one.delta().flatten(1)
        rough = 2e-3 if dtype == torch.float16 else 1e-6
        close = rough * float(wanted.abs().max())
        torch.testing.assert_close(found[name.replace(".", "_")].float(), wanted, atol=close, rtol=rough)


def test_a_scale_that_b_cannot_take_goes_into_a() -> None:
    one = LoraLayer(torch.full((2, 3), 1e-3).half(), torch.full((4, 2), 6e4).half(), 20.0)
    other = one.with_scale_one()
    assert other.scale == 1
    torch.testing.assert_close(other.delta(), one.delta(), rtol=2e-3, atol=0)
    plain = LoraLayer(torch.ones(2, 3), torch.ones(4, 2), 2.0)
    assert plain.with_scale_one() is plain


class Toy(nn.Module):
    """Modules with the names and kinds a UNet has."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(6, 4), "to_out": nn.ModuleList([nn.Linear(4, 6)])})
        block = nn.ModuleDict({"attn1": attention, "conv": nn.Conv2d(3, 5, 3, padding=1), "proj": nn.Conv2d(5, 6, 1)})
        self.down_blocks = nn.ModuleList([block])


class Text(nn.Module):
    """A text encoder's names, with or without the level that transformers 5 dropped."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})])}
        )
        if nested:
            self.text_model = nn.ModuleDict({"encoder": encoder})
        else:
            self.encoder = encoder


SHAPES = {
    "down_blocks.0.attn1.to_q": (4, 6),
    "down_blocks.0.attn1.to_out.0": (6, 4),
    "down_blocks.0.conv": (5, 3, 3, 3),
    "down_blocks.0.proj": (6, 5, 1, 1),
}
TEXT_SHAPES = {"encoder.layers.0.self_attn.q_proj": (4, 4)}


def layer(
    shape: tuple[int, ...], rank: int, alpha: float, seed: int, dora: bool = False, rslora: bool = False
) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, *shape[1:], generator=generator)
    B = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoraLayer(A, B, alpha, rslora, torch.rand(shape[0], generator=generator) + 0.5 if dora else None)


@st.composite
def files(draw: Any, kinds: tuple[bool, ...] = (False, True)) -> LoraFile:
    """Adapters on some modules, with ranks and alphas that differ by layer."""
    dora, rslora = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    ranks = st.integers(1, 5)
    alphas = st.sampled_from([0.5, 1.0, 4.0, 8.0, 3.0])

    def made(shapes: dict[str, tuple[int, ...]], names: list[str]) -> dict[str, LoraLayer]:
        return {
            name: layer(shapes[name], draw(ranks), draw(alphas), draw(st.integers(0, 99)), dora, rslora)
            for name in names
        }

    parts = {"unet": made(SHAPES, modules)}
    if draw(st.booleans()):
        parts["text_encoder"] = made(TEXT_SHAPES, list(TEXT_SHAPES))
    return LoraFile(parts)


def same(found: LoraFile, wanted: LoraFile) -> None:
    """Both make the same update of every weight."""
    assert found.counts() == wanted.counts()
    for (component, module, a), (other, path, b) in zip(found.layers(), wanted.layers(), strict=True):
        assert (component, module) == (other, path)
        torch.testing.assert_close(a.delta(), b.delta())
        assert (a.magnitude is None) == (b.magnitude is None)
        if a.magnitude is not None and b.magnitude is not None:
            torch.testing.assert_close(a.magnitude, b.magnitude)


@QUICK
@given(file=files())
@pytest.mark.parametrize("write", [write_diffusers, write_peft, write_kohya])
def test_round_trip_keeps_every_update(write: Any, file: LoraFile, tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    path = write(file, folder if write is write_peft else folder / "a.safetensors")
    again = fit(read(path), {"unet": Toy(), "text_encoder": Text()})
    same(again, file)


@QUICK
@given(file=files())
def test_written_kohya_uses_the_names_of_old_transformers(file: LoraFile, tmp_path: Path) -> None:
    path = write_kohya(file, tmp_path / "k.safetensors")
    same_nested = fit(read(path), {"unet": Toy(), "text_encoder": Text(nested=True)})
    assert same_nested.counts() == file.counts()


def test_scale_and_metadata_are_kept(tmp_path: Path) -> None:
    one = layer((4, 6), 2, 5.0, 0)
    file = LoraFile({"unet": {"down_blocks.0.attn1.to_q": one}}, metadata={"recipe": "yes"})
    again = read(write_diffusers(file, tmp_path / "a.safetensors"))
    found = again.parts["unet"]["down_blocks.0.attn1.to_q"]
    assert found.scale == 1
    torch.testing.assert_close(found.delta(), one.delta())
    assert again.metadata["recipe"] == "yes"
    assert again.sha256


def old_attention_keys(prefix: str) -> dict[str, torch.Tensor]:
    made = {}
    for name, shape in (("to_q", (4, 6)), ("to_out", (6, 4))):
        made[f"{prefix}down_blocks.0.attn1.processor.{name}_lora.down.weight"] = torch.randn(2, shape[1])
        made[f"{prefix}down_blocks.0.attn1.processor.{name}_lora.up.weight"] = torch.randn(shape[0], 2)
    return made


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_attention_processors_load_all_layers(prefix: str, tmp_path: Path) -> None:
    tensors = old_attention_keys(prefix)
    save_file(tensors, tmp_path / "old.safetensors")
    file = fit(read(tmp_path / "old.safetensors"), {"unet": Toy()})
    assert sorted(file.parts["unet"]) == ["down_blocks.0.attn1.to_out.0", "down_blocks.0.attn1.to_q"]
    expected = (
        tensors[f"{prefix}down_blocks.0.attn1.processor.to_q_lora.up.weight"]
        @ (tensors[f"{prefix}down_blocks.0.attn1.processor.to_q_lora.down.weight"])
    )
    torch.testing.assert_close(file.parts["unet"]["down_blocks.0.attn1.to_q"].delta(), expected)  # no alpha: scale 1


def test_old_text_encoder_names() -> None:
    assert modern_name("text_model.encoder.layers.0.self_attn.to_out") == (
        "text_model.encoder.layers.0.self_attn.out_proj"
    )


def test_peft_directory_made_by_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "conv"], rank_pattern={"conv": 2}, alpha_pattern={"conv": 3}
    )
    model = get_peft_model(Toy(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    file = fit(read(tmp_path), {"unet": Toy()})
    for name, ours in file.parts["unet"].items():
        theirs = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(ours.delta(), theirs.get_delta_weight("default"))
    assert file.parts["unet"]["down_blocks.0.attn1.to_q"].scale == 2.0  # diffusers' own loader says 1.0 here


def test_written_peft_directory_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    file = LoraFile(
        {
            "unet": {
                "down_blocks.0.attn1.to_q": layer((4, 6), 2, 5.0, 0),
                "down_blocks.0.conv": layer((5, 3, 3, 3), 3, 1.0, 1),
            }
        }
    )
    write_peft(file, tmp_path)
    model = PeftModel.from_pretrained(Toy(), tmp_path)
    for name, ours in file.parts["unet"].items():
        torch.testing.assert_close(model.base_model.model.get_submodule(name).get_delta_weight("default"), ours.delta())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_what_diffusers_saves_is_read_with_its_alpha(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    pipe = tiny.FAMILIES[family]()
    path = tiny.lora_file(pipe, tmp_path, rank=2, alpha=6.0, **options)
    name = tiny.denoiser_name(pipe)
    file = fit(read(path), {name: getattr(pipe, name), "text_encoder": pipe.text_encoder})
    assert file.counts()["text_encoder"] == 4
    scales = {layer.scale for _, _, layer in file.layers()}
    assert scales == {6.0 / 2**0.5 if options else 3.0}


def test_written_kohya_file_loads_in_diffusers(tmp_path: Path) -> None:
    pipe = tiny.sd()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    # diffusers recognises kohya's text encoder keys by the one of out_proj
    path = tiny.lora_file(pipe, tmp_path / "a", text_targets=("q_proj", "v_proj", "out_proj"))
    file = fit(read(path), models)
    write_kohya(file, tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="k")
    for component, module, ours in file.layers():
        theirs = getattr(pipe, component).get_submodule(module)
        torch.testing.assert_close(theirs.get_delta_weight("k"), ours.delta())


def test_sha256_is_the_files(tmp_path: Path) -> None:
    import hashlib

    path = write_diffusers(LoraFile({"unet": {"a": layer((4, 6), 2, 5.0, 0)}}), tmp_path / "a.safetensors")
    assert read(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Refusals


def plain() -> dict[str, torch.Tensor]:
    return {
        "unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 6),
        "unet.down_blocks.0.attn1.to_q.lora_B.weight": torch.randn(4, 2),
    }


def refused(tensors: dict[str, torch.Tensor], tmp_path: Path, metadata: dict[str, str] | None = None) -> str:
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(InputError) as caught:
        fit(read(tmp_path / "bad.safetensors"), {"unet": Toy()})
    return str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(bad: float, tmp_path: Path) -> None:
    tensors = plain()
    tensors["unet.down_blocks.0.attn1.to_q.lora_B.weight"][0, 0] = bad
    assert "NaN or infinite" in refused(tensors, tmp_path)


def test_another_family_names_the_layer_and_both_shapes(tmp_path: Path) -> None:
    tensors = plain()
    tensors["unet.down_blocks.0.attn1.to_q.lora_A.weight"] = torch.randn(2, 9)
    message = refused(tensors, tmp_path)
    assert "unet.down_blocks.0.attn1.to_q" in message
    assert "(4, 9)" in message
    assert "(4, 6)" in message


def test_a_module_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tensors = {key.replace("to_q", "to_x"): value for key, value in plain().items()}
    message = refused(tensors, tmp_path)
    assert "no module 'down_blocks.0.attn1.to_x'" in message
    assert "did you mean" in message


def test_a_component_the_model_lacks_is_a_family_error(tmp_path: Path) -> None:
    tensors = {key.replace("unet.", "transformer."): value for key, value in plain().items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(FamilyError, match="'transformer'"):
        fit(read(tmp_path / "bad.safetensors"), {"unet": Toy()})


def test_unknown_keys_are_an_error_not_a_warning(tmp_path: Path) -> None:
    assert "not understood" in refused(plain() | {"unet.something.else": torch.ones(1)}, tmp_path)


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    tensors = plain()
    del tensors["unet.down_blocks.0.attn1.to_q.lora_B.weight"]
    assert "has no B" in refused(tensors, tmp_path)


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ("lora_unet_down_blocks_0_conv.oft_blocks", "OFT", "depends on the base model"),
        ("lora_unet_down_blocks_0_conv.a1.weight", "GLoRA", "depends on the base model"),
        ("lora_unet_down_blocks_0_conv.on_input", "IA3", "depends on the base model"),
        ("lora_unet_down_blocks_0_norm.w_norm", "normalisation", "only linear layers"),
        ("transformer.x_embedder.lora_B.bias", "biases", "control pipeline"),
    ],
)
def test_formats_that_cannot_be_composed_are_refused_with_the_reason(
    key: str, name: str, reason: str, tmp_path: Path
) -> None:
    message = refused({key: torch.ones(2, 2)}, tmp_path)
    assert name in message
    assert reason in message
    assert len({label for _, label, _ in FOREIGN}) == len(FOREIGN)


def test_damaged_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="not a readable safetensors"):
        read(tmp_path / "broken.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="no tensors"):
        read(tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"'\.txt'"):
        read(tmp_path / "notes.txt")


def test_a_pickle_is_only_read_as_tensors(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "fine.pt")
    assert read(tmp_path / "fine.pt").counts() == {"unet": 1}

    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(InputError, match="code in it is never run"):
        read(tmp_path / "code.pt")


def test_peft_keys_without_their_configuration(tmp_path: Path) -> None:
    tensors = {key.replace("unet.", "base_model.model."): value for key, value in plain().items()}
    assert "adapter_config.json" in refused(tensors, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "VERA"}, "VERA"),
        ({"modules_to_save": ["conv"]}, "whole modules"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
    ],
)
def test_peft_configurations_that_are_more_than_lora(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = LoraFile({"unet": {"down_blocks.0.attn1.to_q": layer((4, 6), 2, 5.0, 0)}})
    write_peft(file, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=words):
        read(tmp_path)


def test_config_of_mixed_kinds_is_refused() -> None:
    with pytest.raises(InputError, match="different kinds"):
        config_of({"a": layer((4, 6), 2, 1.0, 0), "b": layer((4, 6), 2, 1.0, 0, dora=True)})


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    file = LoraFile({"unet": {"down_blocks.0.attn1.to_q": layer((4, 6), 2, 5.0, 0)}})
    blocked = tmp_path / "there"
    blocked.mkdir()
    (blocked / "x").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        write_diffusers(file, blocked)
    assert [item.name for item in tmp_path.iterdir()] == ["there"]


def test_written_files_are_plain_safetensors(tmp_path: Path) -> None:
    file = LoraFile({"unet": {"down_blocks.0.attn1.to_q": layer((4, 6), 2, 5.0, 0)}})
    path = write_diffusers(file, tmp_path / "a.safetensors", {"note": "x"})
    assert set(load_file(path)) == set(plain())
    with safe_open(path, framework="pt") as content:
        assert content.metadata()["note"] == "x"
