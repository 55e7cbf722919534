"""Regions: what must hold exactly, on tiny random models of every family, against independent references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.regions import Region
from pipelines.diffusion.regions.unet import RegionalUNet
from tests import tiny
from tests.pipelines.conftest import CALL, PROMPT, Bed, close, latents

ALL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
UNETS = ("sd", "sdxl")
INSIDE = (*UNETS, "sd3", "flux", "qwen", "z-image", "krea2", "flux2", "flux2-klein", "chroma", "lumina2",
          "auraflow", "sana", "cogview4", "ernie-image")  # fmt: skip
"""Families in which regions act inside the network."""


def regional(composer: MultiLoRAPipeline, method: str, *regions: Region, **options: Any) -> torch.Tensor:
    """The denoised latents of a short run with regions."""
    how = {
        key: options.pop(key)
        for key in list(options)
        if key not in CALL and key not in ("prompt", "negative_prompt", "images", "scheduler", "cfg_normalization")
    }
    composer.compose(method, regions=list(regions), **how)
    result: torch.Tensor = composer(options.pop("prompt", PROMPT), **(CALL | options)).images
    return result


FAMILIES_AND_METHODS = [
    *((family, "output") for family in tiny.PICTURES),
    *((family, "activation") for family in INSIDE),
]


# One region, no region


@pytest.mark.parametrize(("family", "method"), FAMILIES_AND_METHODS)
def test_a_region_of_the_whole_picture_is_plain_lora(beds: Any, family: str, method: str) -> None:
    bed: Bed = beds(family)
    # the pooled text of SD3 and Flux stays the background's, so there no text encoder layers
    te_weight = 0 if family not in UNETS and method == "activation" else None
    composer = MultiLoRAPipeline(bed.pipe())
    for name in ("a", "c"):
        composer.load_lora(bed.files[name], name, weight=0.8, te_weight=te_weight)
    plain = latents(composer, "merge")
    close(regional(composer, method, Region(("a", "c"), box=ALL)), plain)
    assert bool((plain - latents(bed.composer(), "merge")).abs().max() > 1e-3)


@pytest.mark.parametrize("family", [family for family in INSIDE if family not in (*UNETS, "sd3", "flux")])
@pytest.mark.parametrize(("prompt", "negative", "guidance"), [
    ("a cat", "a dog " * 30, 4.0), ("a cat " * 30, None, 4.0), ("dogs " * 40, "", 0.0),
])  # fmt: skip
def test_the_text_of_a_region_of_the_whole_picture_stands_where_it_would_alone(
    beds: Any, family: str, prompt: str, negative: str | None, guidance: float
) -> None:
    composer = beds(family).composer("a")
    call = {**CALL, "guidance_scale": guidance, "images": 2}
    composer.compose("activation", regions=[Region(("a",), box=ALL, prompt=prompt, negative=negative)])
    found = composer(PROMPT, negative_prompt="dull", **call).images
    composer.compose("merge")
    close(found, composer(prompt, negative_prompt="dull" if negative is None else negative, **call).images)


@pytest.mark.parametrize("family", UNETS)
def test_cross_on_the_whole_picture_is_the_lora_restricted_to_cross_attention(beds: Any, family: str) -> None:
    bed: Bed = beds(family)
    full = bed.composer("a")
    loaded = full.rack.loaded["a"].file
    kept = {k: v for k, v in loaded.parts["unet"].items() if k.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0"))}
    restricted = MultiLoRAPipeline(bed.pipe())
    restricted.load_lora(loaded.with_parts({**loaded.parts, "unet": kept}), "a", weight=0.7)
    wanted = latents(restricted, "merge")
    composer = bed.composer("a", a=0.7)
    close(regional(composer, "cross", Region(("a",), box=ALL)), wanted)
    close(regional(composer, "lora-composer", Region(("a",), box=ALL), reinit=False, refine=False), wanted)


@pytest.mark.parametrize(("family", "method"), [*FAMILIES_AND_METHODS, *((family, "cross") for family in UNETS)])
def test_scale_zero_with_the_same_prompt_is_the_base_model(beds: Any, family: str, method: str) -> None:
    bed: Bed = beds(family)
    composer = bed.composer("a", "b") if family in UNETS or method == "output" else bed.composer("a")
    base = latents(bed.composer(), "merge")
    # SD3 and Flux: a region sees its own copy of the prompt, so the whole picture must be one region
    boxes = (LEFT, RIGHT) if family in UNETS or method == "output" else (ALL,)
    found = regional(composer, method, *(Region((n,), box=b, scale=0) for n, b in zip("ab", boxes, strict=False)))
    close(found, base)


@pytest.mark.parametrize("method", ["output", "activation", "cross"])
def test_adapters_in_no_region_act_everywhere(beds: Any, method: str) -> None:
    bed: Bed = beds("sd")
    composer = bed.composer("a", "b", "c")
    wanted = latents(bed.composer("b", "c"), "merge")
    close(regional(composer, method, Region(("a",), box=LEFT, scale=0)), wanted)


# Several regions


@pytest.mark.parametrize("method", ["output", "activation", "cross"])
@pytest.mark.parametrize("family", UNETS)
def test_two_halves_with_the_same_adapter_are_one_region(beds: Any, family: str, method: str) -> None:
    composer = beds(family).composer("a", "c") if method != "cross" else beds(family).composer("a")
    names = tuple(composer.adapters)
    halves = regional(composer, method, Region(names, box=LEFT), Region(names, box=RIGHT))
    close(halves, regional(composer, method, Region(names, box=ALL)))


@pytest.mark.parametrize("method", ["output", "activation", "cross"])
def test_order_and_duplicates_change_nothing(sd: Bed, method: str) -> None:
    composer = sd.composer("a", "b")
    one = Region(("a",), box=(0, 0, 0.75, 1), prompt="a cat")
    two = Region(("b",), box=(0.5, 0, 1, 1), prompt="a dog")
    found = regional(composer, method, one, two)
    close(regional(composer, method, two, one), found)
    single = regional(composer, method, one)
    close(regional(composer, method, one, one), single)
    assert not torch.allclose(found, single)


def test_a_prediction_is_each_regions_own(sd: Bed) -> None:
    """``output`` with one step, against as many plain runs, cut at the border."""
    composer = sd.composer("a", "b")
    regions = Region(("a",), box=LEFT, prompt="a cat", negative="red"), Region(("b",), box=(0.5, 0, 0.75, 1))
    found = regional(composer, "output", *regions, steps=1, adapter_batch=2)
    left = latents(sd.composer("a"), "merge", prompt="a cat", steps=1, negative_prompt="red")
    middle = latents(sd.composer("b"), "merge", steps=1)
    rest = latents(sd.composer(), "merge", steps=1)
    close(found, torch.cat([left[..., :8], middle[..., 8:12], rest[..., 12:]], -1))


@pytest.mark.parametrize(("family", "method"), [pair for pair in FAMILIES_AND_METHODS if pair[0] not in UNETS])
def test_regions_differ_in_joint_transformers(beds: Any, family: str, method: str) -> None:
    composer = beds(family).composer("a", "b")
    one, two = Region(("a",), box=LEFT, prompt="a cat"), Region(("b",), box=RIGHT, prompt="a dog")
    found = regional(composer, method, one, two)
    close(regional(composer, method, two, one), found)
    assert not torch.allclose(found, regional(composer, method, one, Region(("b",), box=RIGHT, prompt="a cat")))
    if method == "activation" and composer.family.layout.linear:
        with pytest.raises(InputError, match="self_mask cannot divide"):
            regional(composer, method, one, two, self_mask=True)
    elif method == "activation":
        assert not torch.allclose(found, regional(composer, method, one, two, self_mask=True))


def test_a_mask_is_the_box_it_draws(sd: Bed) -> None:
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    composer = sd.composer("a", "b")
    for method in ("output", "activation", "cross"):
        drawn = regional(composer, method, Region(("a",), mask=mask, prompt="a cat"))
        assert torch.equal(drawn, regional(composer, method, Region(("a",), box=LEFT, prompt="a cat")))


def test_kept_keys_are_those_made_anew(sd: Bed) -> None:
    """A schedule that changes nothing makes keys and values again at every step."""
    composer = sd.composer("a")
    kept = regional(composer, "cross", Region(("a",), box=LEFT, prompt="a cat"))
    calls: list[int] = []
    composer.pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.register_forward_hook(
        lambda *_: calls.append(1)
    )
    assert torch.equal(kept, regional(composer, "cross", Region(("a",), box=LEFT, prompt="a cat")))
    assert len(calls) == 2  # once per row, whatever the number of steps
    with pytest.MonkeyPatch.context() as patch:  # forget them before every step
        prepare = RegionalUNet.prepare

        def anew(run: RegionalUNet, sample: torch.Tensor) -> None:
            run._set = None
            prepare(run, sample)

        patch.setattr(RegionalUNet, "prepare", anew)
        calls.clear()
        assert torch.equal(kept, regional(composer, "cross", Region(("a",), box=LEFT, prompt="a cat")))
        assert len(calls) == 2 * CALL["steps"]
    calls.clear()
    flutter = [(0, 1), (0.25, 1), (0.25, 1 + 1e-7), (0.5, 1), (1, 1)]
    again = regional(composer, "cross", Region(("a",), box=LEFT, prompt="a cat", schedule=flutter))
    assert len(calls) > 4
    close(again, kept, 1e-4)


def test_a_schedule_of_half_the_steps(sd: Bed) -> None:
    composer = sd.composer("a")
    on = [(0, 1), (0.5, 1), (0.5, 0), (1, 0)]
    found = regional(composer, "activation", Region(("a",), box=ALL, schedule=on))
    wanted = MultiLoRAPipeline(sd.pipe())
    wanted.load_lora(sd.files["a"], "a", schedule=on)
    close(found, latents(wanted, "merge"))


def test_pictures_of_a_batch_are_those_made_alone(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    regions = Region(("a",), box=LEFT, prompt="a cat"), Region(("b",), box=RIGHT, prompt="a dog")
    for method in ("output", "activation", "cross"):
        both = regional(composer, method, *regions, images=2)
        close(both[1:], regional(composer, method, *regions, seed=CALL["seed"] + 1), 1e-4)


def test_the_plan_shows_regions_and_warns_of_unused_layers(sd: Bed) -> None:
    composer = sd.composer("a", "b")
    composer.compose("cross", regions=[Region(("a",), box=LEFT, prompt="a cat", scale=0.5)])
    plan = composer.plan(steps=4)
    assert "region a: box 0, 0, 0.5, 1; a x 0.5; 'a cat'" in str(plan)
    assert any("'a' is outside cross-attention" in text for text in plan.warnings)
    assert plan.to_dict()["regions"][0]["scale"] == 0.5
    assert plan.to_dict()["options"]["scope"] == "cross"
    composer.compose("output", regions=[Region(("a",), box=LEFT)])
    assert composer.plan(steps=4).forwards == 8


# Adapters loaded with a region


def test_an_adapter_brings_its_region(sd: Bed) -> None:
    wanted = regional(sd.composer("a", "b"), "activation", Region(("a",), box=LEFT, prompt="a cat"))
    composer = MultiLoRAPipeline(sd.pipe())
    report = composer.load_lora(sd.files["a"], "a", region={"box": LEFT, "prompt": "a cat"})
    composer.load_lora(sd.files["b"], "b")
    assert str(report).endswith("region a: box 0, 0, 0.5, 1; a; 'a cat'")
    composer.compose("activation")
    assert torch.equal(composer(PROMPT, **CALL).images, wanted)
    composer.compose("activation", regions=[Region(("b",), box=RIGHT)])  # regions of the call replace its own
    assert [region.name for region in composer.plan(steps=4).regions] == ["b"]


@pytest.mark.parametrize(
    ("region", "sentence"),
    [
        ({"box": (0, 0, 1.2, 1)}, "between 0 and 1"),
        ({}, "needs a box or a mask"),
        ({"bx": LEFT}, "did you mean 'box'"),
        (Region(("a", "b"), box=LEFT), "for this adapter only"),
    ],
)
def test_a_region_that_cannot_be_is_refused_with_its_adapter(sd: Bed, region: Any, sentence: str) -> None:
    composer = MultiLoRAPipeline(sd.pipe())
    with pytest.raises(InputError, match=sentence):
        composer.load_lora(sd.files["a"], "a", region=region)
    assert not composer.adapters


def test_a_method_without_regions_does_not_ignore_one(sd: Bed) -> None:
    composer = MultiLoRAPipeline(sd.pipe())
    composer.load_lora(sd.files["a"], "a", region={"box": LEFT})
    with pytest.raises(InputError, match="'a' was loaded with a region"):
        composer(PROMPT, **CALL)
    composer.compose("activation").unload_lora("a")
    composer.load_lora(sd.files["b"], "b")
    with pytest.raises(InputError, match="'activation' needs regions"):
        composer(PROMPT, **CALL)


# Bad input


@pytest.mark.parametrize(
    ("method", "regions", "options", "sentence"),
    [
        ("activation", [Region(("a",), box=(0, 0, 1.2, 1))], {}, "between 0 and 1"),
        ("activation", [Region(("a",), box=(0.5, 0, 0.5, 1))], {}, "x0 < x1"),
        ("activation", [Region(("a",), box=(0, 0.7, 1, 0.2))], {}, "y0 < y1"),
        ("activation", [Region((), box=ALL)], {}, "has no adapter"),
        ("activation", [{"box": ALL}], {}, "has no adapters"),
        ("activation", [{"box": ALL, "adapter": "a"}], {}, "did you mean 'adapters'"),
        ("activation", [Region(("cat",), box=ALL)], {}, "names the adapter 'cat'"),
        ("activation", [Region(("a", "a"), box=ALL)], {}, "twice"),
        ("activation", [Region(("a",))], {}, "needs a box or a mask"),
        ("activation", [Region(("a",), box=ALL, mask="x.png")], {}, "but not both"),
        ("activation", [Region(("a",), box=ALL, scale=float("nan"))], {}, "finite"),
        ("activation", [Region(("a",), box=ALL, schedule=[(0.5, 1), (0.2, 1)])], {}, "not in order"),
        ("activation", [Region(("a",), mask="nothing.png")], {}, "no such file"),
        ("activation", [Region(("a",), mask="data:text/plain,hello")], {}, "cannot be read as a picture"),
        ("activation", [Region(("a",), mask=torch.zeros(8, 8))], {}, "not empty"),
        ("activation", [Region(("a",), mask=torch.ones(8, 16))], {}, "must have the picture's aspect ratio"),
        ("activation", [Region(("a",), box=(0, 0, 0.01, 1))], {}, "covers no whole cell"),
        ("activation", [], {}, "needs regions"),
        ("activation", "atuo", {}, "'auto', got 'atuo'"),
        ("merge", [Region(("a",), box=ALL)], {}, "has no regions"),
        ("merge", None, {"refine": True}, "refine would have no effect"),
        ("cross", [Region(("c",), box=ALL)], {}, "no layer in cross-attention"),
        ("cross", [Region(("a",), box=ALL)], {"scope": "spatial"}, "always has the scope 'cross'"),
        ("lora-composer", [Region(("a",), box=ALL)], {"scope": "sptial"}, "Unknown scope"),
        ("lora-composer", [Region(("a",), box=ALL)], {"trust_region": 0}, "above 0"),
        ("lora-composer", [Region(("a",), box=ALL)], {"refin": True}, "did you mean 'refine'"),
        ("lora-composer", [Region(("a",), box=ALL, words=("apple",))], {"capture": 3}, "capture 3"),
        ("lora-composer", [Region(("a",), box=ALL)], {}, "which word of"),
        ("lora-composer", [Region(("a",), box=ALL, words=("dog",))], {}, "does not contain the word 'dog'"),
        ("lora-composer", [Region(("a",), box=ALL, words=("<c1>",), prompt="a <c1>")], {}, "does not know the concept"),
        ("lora-composer", [Region(("a",), box=ALL, words=("zz",), prompt="a" * 600 + " zz")], {}, "beyond the 640 tok"),
        ("lora-composer", [Region(("a",), box=(0, 0, 0.15, 1), words=("apple",))], {}, "less than 2 cells"),
        ("output", [Region(("a",), box=ALL)], {"reinit": True}, "separate predictions"),
        ("output", [Region(("a",), box=ALL)], {"te_mode": "merged"}, "te_mode"),
    ],
)
def test_bad_input_is_a_sentence(sd: Bed, method: str, regions: Any, options: Any, sentence: str) -> None:
    composer = sd.composer("a", "b", "c")
    with pytest.raises(InputError, match=sentence):
        composer.compose(method, regions=regions, **options)(PROMPT, **CALL)


@pytest.mark.parametrize("family", [family for family in tiny.PICTURES if family not in UNETS])
def test_a_prediction_of_a_transformer_is_each_regions_own(beds: Any, family: str) -> None:
    """``output`` with one step and texts of different lengths, against plain runs, cut at the border."""
    bed: Bed = beds(family)
    regions = Region(("a", "c"), box=LEFT, prompt="a large cat", negative="red"), Region(("b",), box=RIGHT)
    three, two, one = bed.composer("a", "b", "c"), bed.composer("a", "c"), bed.composer("b")
    for composer in (three, two, one):
        composer.pipe.scheduler.register_to_config(shift_terminal=None)  # it needs two steps
    # Lumina 2 restores norms over whole rows of the picture, across the border
    more = {"cfg_normalization": False} if "cfg_normalization" in three.own_arguments else {}
    found = regional(three, "output", *regions, steps=1, **more)
    left = latents(two, "merge", prompt="a large cat", steps=1, negative_prompt="red", **more)
    right = latents(one, "merge", steps=1, **more)
    if found.ndim == 3:  # packed tokens of 8 x 8
        found, left, right = (part.unflatten(1, (8, 8)).movedim(3, 1) for part in (found, left, right))
    half = found.shape[-1] // 2
    close(found, torch.cat([left[..., :half], right[..., half:]], -1), 1e-4)


def test_a_region_has_its_own_text_in_both_passes(beds: Any) -> None:
    """Also where prompt and negative prompt are the same text."""
    composer = beds("qwen").composer("a")
    regions = [Region(("a",), box=ALL, prompt="a long apple", negative="b")]
    found = regional(composer, "output", *regions, prompt="c", negative_prompt="c")
    close(found, latents(composer, "merge", prompt="a long apple", negative_prompt="b"), 1e-4)


@pytest.mark.parametrize("method", ["cross", "lora-composer"])
def test_joint_transformers_have_no_cross_attention(beds: Any, method: str) -> None:
    with pytest.raises(InputError, match="no separate cross-attention"):
        beds("flux").composer("a").compose(method, regions=[Region(("a",), box=ALL)])


def test_sliced_attention_is_refused(sd: Bed) -> None:
    composer = sd.composer("a")
    composer.pipe.enable_attention_slicing()
    composer.compose("cross", regions=[Region(("a",), box=ALL)])
    with pytest.raises(InputError, match="attention slicing"):
        composer(PROMPT, **CALL)


def test_a_size_that_attention_maps_do_not_divide(sd: Bed) -> None:
    composer = sd.composer("a")
    composer.compose("lora-composer", regions=[Region(("a",), box=ALL, words=("apple",))], capture=2)
    with pytest.raises(InputError, match="multiples of 4"):
        composer(PROMPT, **(CALL | {"width": 34}))


@pytest.mark.parametrize("family", ["qwen", "z-image"])
def test_words_of_a_chat_template_are_found_by_their_letters(beds: Any, family: str) -> None:
    composer = beds(family).composer("a")
    pipe, text = composer.pipe, "two cats and a doghouse, one dog"
    spans = composer.family.text_spans(pipe, text)
    whole = composer.family.encode(pipe, text, None, 1, False).positive["embeds"]
    assert len(spans) == len(whole[0])
    for word, place in (("cats", 4), ("dog", text.rindex("dog"))):
        found = composer._prompts().positions(text, [word], "x", None, {})
        letters = "".join(text[slice(*spans[k])] for k in found)
        assert letters.strip() == word
        assert min(spans[k][0] for k in found) in (place, place - 1)  # a token may begin with the space before
    with pytest.raises(InputError, match="does not contain the word 'cat'"):
        composer._prompts().positions(text, ["cat"], "x", None, {})


READ_BY_LANGUAGE_MODELS = [
    "qwen", "z-image", "flux2", "flux2-klein", "krea2", "lumina2", "cogview4", "ernie-image", "sana"
]  # fmt: skip


@pytest.mark.parametrize("family", READ_BY_LANGUAGE_MODELS)
def test_a_word_stands_where_another_word_changes_the_states(beds: Any, family: str) -> None:
    """The first states that change, since language models read from the left."""
    composer = beds(family).composer("a")
    pipe, words = composer.pipe, ("cat", "fox")
    states = [composer.family.encode(pipe, f"a large {word}", None, 1, False).positive["embeds"][0] for word in words]
    length = min(map(len, states))
    differ = (states[0][:length] != states[1][:length]).flatten(1).any(1).nonzero().flatten()
    found = composer._prompts().positions("a large cat", ["cat"], "x", None, {})
    assert found[0] == int(differ[0])


@pytest.mark.parametrize("family", [family for family in INSIDE if family not in UNETS])
def test_transformers_find_places_for_automatic_regions(beds: Any, family: str) -> None:
    bed: Bed = beds(family)
    composer = MultiLoRAPipeline(bed.pipe())
    for name, word in (("a", "cat"), ("b", "dog")):
        composer.load_lora(bed.files[name], name, triggers=(word,))
    composer.compose("activation", regions="auto")
    out = composer("a cat a dog", **CALL)
    assert [region.name for region in out.regions] == ["a", "b"]
    masks = [torch.tensor(list(region.mask.getdata())) > 0 for region in out.regions]
    assert all(bool(mask.any()) for mask in masks)
    assert not bool((masks[0] & masks[1]).any())


@pytest.mark.parametrize("family", [
    name for name, known in tiny.families.FAMILIES.items() if name not in INSIDE and known.video is None
])  # fmt: skip
def test_regions_inside_other_networks_are_refused(beds: Any, family: str) -> None:
    assert not tiny.families.FAMILIES[family].inner_regions
    with pytest.raises(InputError, match=r"not possible.*: use method 'output'"):
        regional(beds(family).composer("a"), "activation", Region(("a",), box=LEFT))
