"""The pointmap network and its weights: public key tables, parity of cached encoding, strict and safe loading."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InputError
from assets.build.dust3r import initialise
from pipelines.geometry import checkpoints, estimate
from pipelines.geometry.images import Affine, Photo
from pipelines.geometry.inference import predict
from pipelines.geometry.licence import licence_of
from pipelines.geometry.network import TINY, NetworkConfig, PointmapNetwork, points_of, rotate
from pipelines.geometry.pairs import make_pairs

SMALL = NetworkConfig(img_size=(32, 32), patch_size=8, enc_embed_dim=48, enc_depth=2, enc_num_heads=4, dec_embed_dim=32,
                      dec_depth=2, dec_num_heads=2)  # fmt: skip
SMALL_DPT = NetworkConfig(img_size=(64, 64), patch_size=16, enc_embed_dim=32, enc_depth=1, enc_num_heads=2,
                          dec_embed_dim=16, dec_depth=4, dec_num_heads=2, head_type="dpt")  # fmt: skip
CONSTRUCTOR = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(32, 32), "
    "head_type='linear', output_mode='pts3d', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), patch_size=8, "
    "enc_embed_dim=48, enc_depth=2, enc_num_heads=4, dec_embed_dim=32, dec_depth=2, dec_num_heads=2)"
)


def network(config: NetworkConfig = SMALL) -> PointmapNetwork:
    return initialise(PointmapNetwork(config), torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(("head", "keys", "parameters"), [("linear", 877, 532_342_784), ("dpt", 1009, 571_171_208)])
def test_the_real_sizes_have_the_public_keys(head: Any, keys: int, parameters: int) -> None:
    with torch.device("meta"):
        real = PointmapNetwork(NetworkConfig(head_type=head))
    state = real.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in real.parameters()) == parameters
    shapes = {
        "mask_token": (1, 1, 768), "patch_embed.proj.weight": (1024, 3, 16, 16),
        "enc_blocks.23.attn.qkv.weight": (3072, 1024),
        "enc_blocks.0.mlp.fc2.weight": (1024, 4096), "decoder_embed.weight": (768, 1024),
        "dec_blocks.11.cross_attn.projq.weight": (768, 768), "dec_blocks2.11.norm_y.bias": (768,),
        "dec_blocks2.0.mlp.fc1.weight": (3072, 768),
    }  # fmt: skip
    if head == "linear":
        shapes["downstream_head2.proj.weight"] = (1024, 768)
    else:
        shapes["downstream_head1.dpt.act_postprocess.0.1.weight"] = (96, 96, 4, 4)
        shapes["downstream_head1.dpt.act_postprocess.3.1.weight"] = (768, 768, 3, 3)
        shapes["downstream_head1.dpt.scratch.layer4_rn.weight"] = (256, 768, 3, 3)
        shapes["downstream_head1.dpt.scratch.layer_rn.3.weight"] = (256, 768, 3, 3)
        shapes["downstream_head1.dpt.scratch.refinenet4.resConfUnit1.conv2.bias"] = (256,)
        shapes["downstream_head1.dpt.head.4.weight"] = (4, 128, 1, 1)
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_the_embedded_model_is_small() -> None:
    assert sum(p.numel() for p in PointmapNetwork(TINY).parameters()) == 4_916_416


def test_rotary_code_depends_on_relative_positions_only() -> None:
    """<R(p) q, R(p') k> is a function of p - p': the reference is complex multiplication per frequency."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    grid = (5, 4)
    turned_q, turned_k = (rotate(x.expand(1, 1, 20, 8), grid, 100.0)[0, 0] for x in (q, k))
    products = (turned_q @ turned_k.T).unflatten(0, grid).unflatten(2, grid)
    assert float(products[0, 0, 2, 1]) == pytest.approx(float(products[1, 2, 3, 3]), abs=1e-6)
    y, x = 3, 2
    pair = torch.complex(q[0, 0, 0, [0, 1, 4, 5]], q[0, 0, 0, [2, 3, 6, 7]])
    angle = torch.tensor([y, y / 10, x, x / 10], dtype=torch.float64)
    wanted = pair * torch.polar(torch.ones_like(angle), angle)
    got = turned_q[y * 4 + x]
    torch.testing.assert_close(torch.complex(got[[0, 1, 4, 5]], got[[2, 3, 6, 7]]), wanted, atol=1e-6, rtol=1e-6)


def test_output_conventions() -> None:
    channels = torch.randn(2, 4, 3, 3)
    points, confidence = points_of(channels, SMALL)
    r = channels[:, :3].norm(dim=1)
    torch.testing.assert_close(points.norm(dim=-1), torch.expm1(r))
    torch.testing.assert_close(confidence, 1 + channels[:, 3].exp())
    assert points_of(torch.zeros(1, 4, 1, 1), SMALL).points.abs().max() == 0


@pytest.mark.parametrize("shapes", [((32, 48), (32, 48)), ((48, 32), (32, 48)), ((72, 56), (40, 32))])
def test_pairs_of_any_sizes_and_cached_encodings(shapes: Any) -> None:
    model = network()
    a, b = (torch.rand(1, 3, *shape) * 2 - 1 for shape in shapes)
    first, second = model(a, b)
    assert first.points.shape == (1, *shapes[0], 3)
    assert second.confidence.shape == (1, *shapes[1])
    cached = model.decode(model.encode(a), model.encode(b))
    assert torch.equal(cached[1].points, second.points)


@pytest.mark.parametrize("shape", [(64, 64), (112, 144), (144, 112)])
def test_the_dpt_head_answers_in_full_resolution_also_on_odd_grids(shape: tuple[int, int]) -> None:
    model = network(SMALL_DPT)
    first, second = model(torch.rand(1, 3, *shape), torch.rand(1, 3, *shape))
    assert first.points.shape == second.points.shape == (1, *shape, 3)
    assert bool((first.confidence > 1).all())


def test_the_decoders_read_each_other_one_layer_late() -> None:
    """Swapping both the images and the two decoders swaps the answers."""
    model, swapped = network(), network()
    swapped.dec_blocks, swapped.dec_blocks2 = swapped.dec_blocks2, swapped.dec_blocks
    swapped.downstream_head1, swapped.downstream_head2 = swapped.downstream_head2, swapped.downstream_head1
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    x, y = model(a, b)
    q, p = swapped(b, a)
    torch.testing.assert_close(p.points, x.points)
    torch.testing.assert_close(q.points, y.points)


def test_each_picture_is_encoded_once_and_their_order_does_not_matter() -> None:
    model, calls = network(), []
    encode = model.encode
    model.encode = lambda image: calls.append(1) or encode(image)  # type: ignore[method-assign]
    photos = [Photo(torch.rand(3, 32, 32), Affine(), str(n)) for n in range(4)]
    pairs = make_pairs(4)
    told = predict(model, photos, pairs, chunk=5)
    assert len(calls) == told.encodings == 4
    assert len(pairs) == 12
    order = [2, 0, 3, 1]
    other = predict(model, [photos[n] for n in order], pairs, chunk=3)
    edge, same = pairs.index((0, 1)), pairs.index((order.index(0), order.index(1)))
    torch.testing.assert_close(other.points2[same], told.points2[edge], atol=1e-5, rtol=1e-4)


def pth(tmp_path: Path, tensors: dict[str, Any], text: str = CONSTRUCTOR) -> Path:
    file = tmp_path / "model.pth"
    torch.save({"args": argparse.Namespace(model=text), "model": tensors}, file)
    return file


def test_pth_and_folder_give_the_same_network(tmp_path: Path) -> None:
    model = network()
    opened = checkpoints.open_checkpoint(pth(tmp_path, model.state_dict()))
    folder = checkpoints.save_folder(model, tmp_path / "hub", "mine", torch.float32)
    again = checkpoints.open_checkpoint(folder)
    image = torch.rand(1, 3, 32, 32)
    for other in (opened.network, again.network):
        assert torch.equal(other(image, image)[1].points, model(image, image)[1].points)
    assert again.licence == "mine"
    assert again.network.config == opened.network.config == SMALL


def test_aliases_may_be_there_twice_or_once_but_not_differ(tmp_path: Path) -> None:
    model = network(SMALL_DPT)
    state = dict(model.state_dict())
    once = {key: value for key, value in state.items() if ".layer_rn." not in key}
    for tensors in (state, once, {k: v for k, v in state.items() if "layer2_rn" not in k}):
        checkpoints.build(SMALL_DPT, tensors)
    spoilt = {**state, "downstream_head1.dpt.scratch.layer_rn.0.weight": torch.ones(256, 96, 3, 3)}
    with pytest.raises(InputError, match="same tensor"):
        checkpoints.build(SMALL_DPT, spoilt)
    extra = {**state, "downstream_head1.head_local_features.fc1.weight": torch.ones(1)}
    notes: list[str] = []
    checkpoints.build(SMALL_DPT, extra, notes)
    assert notes


def test_loading_is_strict(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    checkpoints.build(SMALL, {k: v for k, v in state.items() if k != "mask_token"})
    for change, message in (
        ({"extra": torch.ones(1)}, "1 unexpected"),
        ({"enc_norm.weight": torch.ones(3)}, "shape"),
        ({"enc_norm.weight": torch.full((48,), math.nan)}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoints.build(SMALL, {**state, **change})
    with pytest.raises(InputError, match="1 missing"):
        checkpoints.build(SMALL, {k: v for k, v in state.items() if k != "enc_norm.bias"})


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    torch.save({"args": _Evil(), "model": {}}, file)
    with pytest.raises(InputError, match="safely"):
        checkpoints.open_checkpoint(file)
    file.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(InputError, match="safely"):
        checkpoints.open_checkpoint(file)


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('x')", "AsymmetricCroCo3DStereo(enc_depth=print(1))", "1 + 1", "Other(enc_depth=1)", "f(",
     "AsymmetricCroCo3DStereo(secret=1)", "AsymmetricCroCo3DStereo(**{'a': 1})", "AsymmetricCroCo3DStereo(1)"],
)  # fmt: skip
def test_constructor_expressions_are_read_and_never_run(text: str) -> None:
    with pytest.raises(InputError):
        checkpoints.parse_constructor(text)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for given_ in (text, f"AsymmetricCroCo3DStereo({text})"):
        try:
            checkpoints.config_from(checkpoints.parse_constructor(given_))
        except InputError:
            continue


def test_a_constructor_with_infinities() -> None:
    assert checkpoints.config_from(checkpoints.parse_constructor(CONSTRUCTOR)) == SMALL


def test_broken_folders_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must contain"):
        checkpoints.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"enc_embed_dim": 6, "enc_num_heads": 2}))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        checkpoints.open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.open_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "has no 'model'"),
        ({"model": {"x": 1}}, "tensors only"),
        ({"model": {}}, r"args\.model is missing"),
        ({"model": {}, "croco_kwargs": {}}, "CroCo"),
        ({"model": {}, "args": argparse.Namespace(model=CONSTRUCTOR)}, r"missing \((\S+, ){9}\S+\), 0 unexpected"),
    ],
)
def test_files_that_are_no_checkpoint_say_why(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        checkpoints.open_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enc_num_heads": 8}, "multiple of 4"), ({"dec_num_heads": 3}, "multiple of 4"),
        ({"head_type": "dpt", "patch_size": 16, "dec_depth": 6}, "4, 8, 12"),
        ({"head_type": "dpt", "patch_size": 16, "dec_depth": 0}, "4, 8, 12"), ({"head_type": "cnn"}, "Unknown head"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_sentences(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **values)


def test_pictures_that_the_network_cannot_take() -> None:
    model = network()
    with pytest.raises(InputError, match="divisible by 8"):
        model.encode(torch.zeros(1, 3, 32, 36))
    with pytest.raises(InputError, match="as many first images as second ones, got 2 and 1"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    photos = [Photo(torch.rand(3, 32, 32), Affine(), f"{n}.png") for n in range(2)]
    photos[1].pixels[0, 3, 3] = torch.nan
    with pytest.raises(InputError, match=r"'1\.png' holds values that are not finite"):
        predict(model, photos, make_pairs(2))
    with torch.no_grad():
        model.downstream_head1.proj.bias.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="points that are not finite"):
        predict(model, photos[:1], [(0, 0)])


def test_public_weights_are_named_non_commercial() -> None:
    assert "not for commercial" in licence_of("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")


def test_the_estimate_counts_what_the_paper_states() -> None:
    """One ordered pair at 512x384 takes 1.5 to 2 TFLOP with the ViT-L model."""
    encode, decode = estimate.flops(NetworkConfig(head_type="dpt"), 384, 512)
    assert 1.2e12 < 2 * encode + decode < 2.2e12
    cost = estimate.estimate(NetworkConfig(), 10, 90, 384, 512, torch.device("cpu"))
    assert cost.memory > 4 * 532_342_784
    assert cost.network_seconds > 0
    assert cost.alignment_seconds == 0
    longer = estimate.estimate(NetworkConfig(), 10, 90, 384, 512, torch.device("cpu"), steps=300)
    assert longer.memory == 4 * 532_342_784 + 90 * 384 * 512 * estimate.ALIGNMENT_BYTES
    assert "alignment" in str(longer)
