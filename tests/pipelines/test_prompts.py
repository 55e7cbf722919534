"""Prompts in a call: long text in chunks, weights, adapters and choices in the words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.errors import InputError
from pipelines.diffusion import MultiLoRAPipeline
from pipelines.diffusion.families.reading import Reader, needed, tokenize
from pipelines.diffusion.prompt_syntax import Piece, Prompt, literal, read
from tests import tiny
from tests.pipelines.conftest import CALL, close, latents

LONG = "a red apple, on a table"
"""18 letters and a comma: two chunks of the tiny CLIP's 14 tokens."""


def test_chunks_end_at_commas() -> None:
    tokenizer, reader = tiny.clip_tokenizer(), Reader("text_encoder", "clip", 16)
    assert needed(tokenizer, reader, literal("abcdefghijklmn")) == 1
    assert needed(tokenizer, reader, literal("abcdefghijklmno")) == 2
    tokens = tokenize(tokenizer, reader, literal(LONG), 3)
    assert tokens.ids.shape == (3, 16)
    spoken = [tokenizer.decode(row[row != tokenizer.eos_token_id][1:]).replace(" ", "") for row in tokens.ids]
    assert spoken == ["aredapple,", "onatable", ""]
    assert tokens.ids[0, 0] == tokens.ids[2, 0] == tokenizer.bos_token_id
    assert [tokens.ids.flatten()[place].item() for place in tokens.places] == list(tokens.content)
    assert tokenize(tokenizer, reader, literal(LONG), 1).lost.replace(" ", "") == "onatable"
    parts = tokenize(tokenizer, reader, Prompt(((Piece("ab"),), (Piece("c", 2.0),))), 2)
    assert parts.places == (1, 2, 17)
    assert parts.weights[1].tolist() == [1, 2, *[1] * 14]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "chroma"])
def test_our_encoding_is_what_the_pipeline_encodes(family: str) -> None:
    """One plain chunk through our own encoding equals diffusers' encoding."""
    composer = MultiLoRAPipeline(tiny.FAMILIES[family]())
    prompts = composer._prompts()
    with torch.no_grad():
        theirs = prompts.encode("a red", "a fox", 2, True)
        counts = prompts.counts(["a red", "a fox"])
        rows = [prompts._encode(literal(text), counts) for text in ("a red", "a fox")]
    assert set(counts.values()) == {1}
    for half, made in zip((theirs.positive, theirs.negative), rows, strict=True):
        for name, tensor in half.items():
            close(tensor, made[name].repeat(2, *[1] * (tensor.ndim - 1)), 1e-6)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_long_text_is_read_to_its_end(family: str) -> None:
    composer = MultiLoRAPipeline(tiny.FAMILIES[family]())
    made = [latents(composer, prompt=f"a fox in the snow, with a {end}") for end in ("hat", "cat")]
    assert not torch.equal(*made)
    plan = composer("a fox in the snow, with a hat", **CALL).plan
    assert any("chunks" in remark for remark in plan.warnings) == (family != "flux")


def test_chunks_are_encoded_one_by_one() -> None:
    composer = MultiLoRAPipeline(tiny.sd())
    prompts, pipe = composer._prompts(), composer.pipe
    with torch.no_grad():
        whole = prompts.encode(LONG, "", 1, True)
        parts = [prompts.encode(text, "", 1, True) for text in ("a red apple,", "on a table")]
    torch.testing.assert_close(whole.positive["embeds"], torch.cat([part.positive["embeds"] for part in parts], 1))
    assert whole.negative is not None
    assert parts[0].negative is not None
    torch.testing.assert_close(whole.negative["embeds"], parts[0].negative["embeds"].repeat(1, 2, 1))
    wanted = pipe(prompt_embeds=whole.positive["embeds"], negative_prompt_embeds=whole.negative["embeds"],
                  generator=torch.Generator().manual_seed(3), num_inference_steps=4, width=32, height=32,
                  guidance_scale=5.0, output_type="latent").images  # fmt: skip
    close(latents(composer, prompt=LONG), wanted)


def test_weights_move_states_away_from_the_empty_prompt() -> None:
    composer = MultiLoRAPipeline(tiny.sd())
    prompts = composer._prompts()
    with torch.no_grad():
        plain, empty, strong, none = (
            prompts.encode(text, "", 1, False).positive["embeds"][0]
            for text in ("a red apple", "", "a (red:1.5) apple", "a (red:1) apple")
        )
    torch.testing.assert_close(none, plain)
    rows = slice(2, 5)  # after the start and "a"
    torch.testing.assert_close(strong[rows], empty[rows] + 1.5 * (plain[rows] - empty[rows]))
    torch.testing.assert_close(strong[5:], plain[5:])
    assert not torch.equal(latents(composer, prompt="a (red:1.5) apple"), latents(composer, prompt="a red apple"))
    assert torch.equal(latents(composer, prompt=r"a \(red\) apple"), latents(composer, prompt="a \\(red\\) apple"))


def test_too_long_for_t5_is_named() -> None:
    composer = MultiLoRAPipeline(tiny.flux())
    plan = composer("a " * 300 + "zebra", **CALL).plan
    assert any("lost" in remark and "a a zebra'" in remark for remark in plan.warnings), plan.warnings


@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_methods_read_long_and_weighted_prompts(family: str, method: str, beds: Any) -> None:
    """Adapters with text encoder layers have encodings of their own, all equally long; one chunk of nothing more
    changes little, other words in the second chunk change the picture."""
    composer = beds(family).composer("a", "b")
    one, other = (latents(composer, method, prompt=f"a (red:1.2) apple, on a {end}") for end in ("table", "cable"))
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("family", "method"), [("sd", "activation"), ("sd", "lora-composer"), ("sdxl", "output"),
                                                ("sd3", "activation"), ("flux", "activation")])  # fmt: skip
def test_regions_read_long_prompts_beside_short_ones(family: str, method: str, beds: Any) -> None:
    composer = beds(family).composer("a", "b")
    made = []
    for end in ("hat", "cat"):
        regions = [{"adapters": ["a"], "box": (0, 0, 0.5, 1), "prompt": f"a fox in the snow, with a {end}"},
                   {"adapters": ["b"], "box": (0.5, 0, 1, 1), "prompt": "a (dog:1.3)"}]  # fmt: skip
        words = [{**region, "words": [word]} for region, word in zip(regions, (end, "dog"), strict=True)]
        made.append(composer.compose(method, regions=words)("a park", **CALL).images)
    assert torch.isfinite(made[0]).all()
    assert not torch.equal(*made)


def test_positions_of_words_in_later_chunks() -> None:
    composer = MultiLoRAPipeline(tiny.sd())
    prompts = composer._prompts()
    counts = prompts.counts([LONG])
    assert prompts.positions(LONG, ["table"], "", None, counts) == [20, 21, 22, 23, 24]
    joint = MultiLoRAPipeline(tiny.sd3())._prompts()
    found = joint.positions(LONG, ["apple"], "", None, joint.counts([LONG]))
    assert len([place for place in found if place < 32]) == 5  # CLIP's two chunks of 16
    assert all(32 <= place < 32 + 256 for place in found if place >= 32)


def test_an_adapter_in_the_prompt_has_its_strength_for_one_call(sd: Any) -> None:
    composer = sd.composer("a", "b")
    before = latents(composer, "merge")
    tagged = latents(composer, "merge", prompt="a red apple <lora:a:0.5> <lora:b:0:0.25>")
    assert torch.equal(latents(composer, "merge"), before)
    other = sd.composer("b")
    other.load_lora(sd.files["a"], "a", weight=0.5)
    other.unload_lora("b")
    other.load_lora(sd.files["b"], "b", weight=0.25, te_weight=0.0)
    close(tagged, latents(other, "merge", adapters=["a", "b"]))
    assert not torch.equal(tagged, before)
    with pytest.raises(InputError, match="names the adapter 'c'"):
        composer("a red apple <lora:c:1>", **CALL)
    with pytest.raises(InputError, match="main prompt only"):
        composer("a red apple", negative_prompt="<lora:a:1>", **CALL)


def test_each_picture_makes_its_own_choice(sd: Any, tmp_path: Any) -> None:
    (tmp_path / "colour.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    composer = sd.composer("a")
    several = composer("a __colour__ {apple|pear}", **CALL, images=4, wildcards=tmp_path).images
    for k in range(4):
        alone = composer("a __colour__ {apple|pear}", **(CALL | {"seed": 3 + k}), wildcards=tmp_path).images
        close(several[k : k + 1], alone)
    plain = {text: composer(text, **CALL).images for c in ("red", "green", "blue") for f in ("apple", "pear")
             if (text := f"a {c} {f}")}  # fmt: skip
    assert any(torch.equal(several[:1], made) or torch.allclose(several[:1], made) for made in plain.values())
    with pytest.raises(InputError, match="wildcards=FOLDER"):
        composer("a __colour__", **CALL)
    assert read("a red apple").plain
