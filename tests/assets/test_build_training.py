"""The trainers' parts: averages, rates, sampling, checkpoints, autoencoder normalisation, judge, evaluation."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from assets.build import adapters, base, cards, common, data, evaluate, judge, latents, text, vae


def test_average_follows_and_resumes() -> None:
    module = nn.Linear(2, 2)
    average = common.Average(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(200):
        average.update(module)
    assert average.decay() == 0.9
    other = common.Average(nn.Linear(2, 2), 0.9)
    other.load(average.state())
    fresh = nn.Linear(2, 2)
    other.copy_to(fresh)
    assert torch.allclose(fresh.weight, torch.ones(2, 2), atol=1e-4)
    assert other.updates == 200


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [base.learning_rate(1.0, step, 10, 1000, 60) for step in range(12)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == 1.0
    assert base.learning_rate(1.0, 50, 10, 30, 60) == pytest.approx(0.5)
    assert base.learning_rate(1.0, 50, 10, 0, 60) == 0.0


def test_noise_depends_on_seed_and_step_only() -> None:
    noise, times = base.draw_noise(1, 5, (8, 4, 2, 2))
    again, same = base.draw_noise(1, 5, (8, 4, 2, 2))
    assert torch.equal(noise, again)
    assert torch.equal(times, same)
    assert not torch.equal(noise, base.draw_noise(1, 6, (8, 4, 2, 2))[0])
    assert times.sort().values.equal(times)
    assert times.min() >= 0
    assert times.max() <= 999
    weight = base.loss_weight(torch.tensor([0.999, 0.8, 0.1]), torch.arange(3))
    assert weight.tolist() == pytest.approx([0.005, 1.0, 1.0], abs=1e-5)


def test_normalised_autoencoder_reconstructs_the_same() -> None:
    torch.manual_seed(0)
    model = vae.new_vae().eval()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 16, 16, 3)).astype(np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = model.encode(x).latent_dist
        decoded = model.decode(before.mean).sample
        vae.normalise_latents(model, images, torch.device("cpu"))
        after = model.encode(x).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, decoded, atol=1e-4)
        latent = after.sample()
    assert latent.mean((0, 2, 3)).abs().max() < 0.3
    assert (latent.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert model.config.scaling_factor == 1.0


def test_vae_crops_and_loss() -> None:
    sprites = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 4)).astype(np.uint8)
    x = vae.batch_of(sprites, np.random.default_rng(1), 4, torch.device("cpu"))
    assert x.shape == (4, 3, vae.CROP, vae.CROP)
    assert x.abs().max() <= 1
    assert vae.loss_terms(x, x, torch.zeros(4)) == 0


@pytest.mark.parametrize("decoder_only", [False, True])
def test_autoencoder_training_resumes_exactly_and_can_spare_the_encoder(tmp_path: Path, decoder_only: bool) -> None:
    sprites = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 4)).astype(np.uint8)
    options = vae.parse(["--steps", "3", "--batch", "1", "--dtype", "fp32", "--save-every", "0"])

    class Stopped(vae.Training):
        """Stops as if killed before the third step."""

        def update(self, x: torch.Tensor, rate: float, dtype: str, seed: int) -> float:
            if self.step == 2:
                raise KeyboardInterrupt
            return super().update(x, rate, dtype, seed)

    def new(kind: type[vae.Training], name: str) -> vae.Training:
        torch.manual_seed(0)
        return kind(vae.new_vae(), tmp_path / name, decoder_only)

    whole = new(vae.Training, "whole.pt")
    start = latents.encoder_digest(whole.vae.state_dict())
    vae.train(whole, sprites, options)
    with pytest.raises(KeyboardInterrupt):
        vae.train(new(Stopped, "parts.pt"), sprites, options)
    parts = new(vae.Training, "parts.pt")
    assert parts.step == 2
    vae.train(parts, sprites, options)
    assert parts.seen == 3
    assert (latents.encoder_digest(whole.vae.state_dict()) == start) is decoder_only
    for a, b in zip(whole.vae.parameters(), parts.vae.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> text.CLIPTokenizer:
    """A tokenizer of a few words, put in place of the real one."""
    pieces, merges = text.train_bpe([("dog", 30), ("icon", 30), ("of", 30), ("a", 30), ("digital", 1)], 6)
    made = text.CLIPTokenizer(vocab=pieces, merges=merges, model_max_length=text.LENGTH)
    monkeypatch.setattr(text, "tokenizer", lambda: made)
    return made


def test_tokenizer_knows_words_splits_others_and_saves(vocabulary: text.CLIPTokenizer, tmp_path: Path) -> None:
    assert vocabulary.tokenize("A dog")[1] == "dog</w>"
    assert len(vocabulary.tokenize("godzilla")) > 1
    ids = text.encode(["a dog", "x " * 90])
    assert ids.shape == (2, text.LENGTH)
    assert ids[0, 0] == vocabulary.bos_token_id
    assert (ids[:, -1] == vocabulary.eos_token_id).all()
    text.save_tokenizer(vocabulary, tmp_path)
    again = text.CLIPTokenizer.from_pretrained(tmp_path)
    assert again("a dog, ok").input_ids == vocabulary("a dog, ok").input_ids
    assert (tmp_path / "merges.txt").read_text().startswith("#version")
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(vocabulary)


class SmallModel(base.Model):
    """The model's shape with a much smaller denoiser."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.text_encoder = text.new_text_encoder(text.tokenizer())
        self.unet = base.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=192, attention_head_dim=1, norm_num_groups=4, mid_block_type=None,
        )  # fmt: skip


def write_shard(folder: Path, count: int) -> None:
    """Write a shard of ``count`` random scenes, as the latents program does."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    np.save(folder / "0000.npy", rng.standard_normal((count, 4, 16, 16)).astype(np.float16))
    scenes = [data.sample_scene(rng, (1, 1, 1)) for _ in range(count)]
    lines = [json.dumps({"caption": s.caption, "subjects": [vars(p) for p in s.subjects]}) for s in scenes]
    (folder / "0000.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("vocabulary")
def test_interrupted_training_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "Model", SmallModel)
    monkeypatch.setattr(latents, "SHARD", 32)
    write_shard(tmp_path / "shards", 32)
    scenes = base.Scenes(tmp_path / "shards")

    def train(folder: str, *limits: int) -> base.Run:
        torch.manual_seed(0)
        for limit in limits:
            options = base.parse(["--max-steps", str(limit), "--batch", "2", "--dtype", "fp32", "--warm-steps", "1"])
            run = base.Run(tmp_path / folder, torch.device("cpu"), 0.9)
            base.train(run, {1: scenes}, options)
        return run

    whole, parts = train("whole", 4), train("parts", 2, 4)
    assert parts.step == 4
    assert parts.samples == 8
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    facts = base.load_average(SmallModel(), tmp_path / "parts" / "average-000004.pt")
    assert facts == {"step": 4, "samples": 8}


@pytest.mark.usefixtures("vocabulary")
def test_scene_mix_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 64)
    write_shard(tmp_path / "shards", 64)
    scenes = base.Scenes(tmp_path / "shards")
    values, tokens, marks, boxes = scenes.draw(np.random.default_rng(0), 300, (1.0, 0.0, 0.0))
    assert values.shape == (300, 4, 16, 16)
    assert values.dtype == torch.float32
    singles = scenes.tokens[scenes.counts == 1]
    empty = text.encode([""])[0]
    blank = (tokens.numpy() == empty).all(1)
    assert 10 <= blank.sum() <= 60
    assert not marks[blank].any()
    assert (marks[~blank].any(-1).sum(-1) == 1).all()
    assert (boxes[:, 0, 2] > boxes[:, 0, 0]).all()
    assert all((singles == row).all(1).any() for row in tokens.numpy()[~blank])


def test_scenes_without_shards_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"assets\.build\.latents"):
        base.Scenes(tmp_path)


def small_judge() -> judge.Judge:
    """An untrained judge with tiny layers."""
    torch.manual_seed(0)
    return judge.Judge(judge.Network(len(data.CONCEPTS), 5, (8, 8)), list(data.CONCEPTS), list(data.STYLES))


def test_judge_answers_are_probabilities_and_survive_saving(tmp_path: Path) -> None:
    made = small_judge()
    facts = {
        "parameters": 1,
        "subjects": 2,
        "pictures": 3,
        "seen": (1.0, 1.0, 3),
        "unseen": (1.0, 1.0, 3),
        "cells out": 1,
    }
    judge.save(made.network, (8, 8), facts, tmp_path)
    again = judge.load_judge(tmp_path)
    images = torch.rand(2, 3, 40, 20)
    answer = made.classify(images)
    assert answer.shape == (2, len(data.CONCEPTS))
    assert torch.allclose(answer.sum(1), torch.ones(2), atol=1e-5)
    assert torch.allclose(again.classify(images), answer, atol=1e-2)
    assert again.classify_style(images).shape == (2, 5)
    half = again.classify_region(images, (0.0, 0.0, 0.5, 1.0))
    assert torch.equal(half, again.classify(images[..., :10]))


def test_judge_refuses_bad_input() -> None:
    made = small_judge()
    with pytest.raises(KeyError, match="sofa"):
        made.index("sofa")
    with pytest.raises(ValueError, match="box"):
        made.classify_region(torch.rand(1, 3, 8, 8), (0.5, 0, 0.5, 1))
    with pytest.raises(ValueError, match="pictures must be"):
        made.classify(torch.rand(3, 8, 8))


def test_judge_pictures_and_held_out_cells() -> None:
    count = len(data.CONCEPTS)
    sprites = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 4)).astype(np.uint8)
    views = judge.Views(sprites, np.arange(count), np.arange(count) % 6 - 1)
    out = judge.held_cells(views, every=10)
    assert 0 < out.sum() < count / 3
    assert not out[views.styles < 0].any()
    x, subject, style = judge.draw_batch(views.only(~out), np.random.default_rng(1), 8)
    assert x.shape == (8, 3, judge.INPUT, judge.INPUT)
    assert 0 <= x.min() <= x.max() <= 1
    assert len(subject) == len(style) == 8


def test_letterbox_keeps_the_shape_of_things() -> None:
    x = torch.zeros(1, 3, 64, 32)
    x[..., 8:] = 1
    y = judge.letterbox(x)
    assert y.shape == (1, 3, 64, 64)
    assert (y[..., :24] == 0).all()
    assert (y[..., 24:] == 1).all()


def test_wilson_interval() -> None:
    low, high = evaluate.wilson(80, 100)
    assert (low, high) == pytest.approx((0.7111, 0.8666), abs=1e-3)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def test_cases_cover_everything_and_parts_repeat() -> None:
    singles, pairs = evaluate.single_cases(), evaluate.pair_cases()
    assert len(singles) == len(data.BASE_CONCEPTS) * 3 * 4
    assert len(pairs) == evaluate.PAIRS >= 300
    assert {name for case in pairs for name in case.names} == set(data.BASE_CONCEPTS)
    assert all(len(set(case.names)) == 2 for case in pairs)
    assert evaluate.part(singles, 0.1) == evaluate.part(singles, 0.1)
    assert len(evaluate.part(pairs, 0.5)) == 156
    with pytest.raises(ValueError, match="fraction"):
        evaluate.part(pairs, 0)


def test_evaluation_counts_what_the_judge_sees() -> None:
    made = small_judge()

    def draw(cases: Sequence[evaluate.Case]) -> torch.Tensor:
        return torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(c.seed)) for c in cases])

    scores, images = evaluate.evaluate(draw, made, 0.01, batch=4)
    assert scores["single"]["pictures"] == 12
    assert scores["pair"]["pictures"] == 3
    assert 0 <= scores["single"]["low"] <= scores["single"]["share"] <= scores["single"]["high"] <= 1
    assert evaluate.sheet(images).dtype == np.uint8


def test_true_art_can_be_scored_with_and_without_the_autoencoder() -> None:
    sprites = np.full((len(data.STYLES), len(data.CONCEPTS), 8, 8, 4), 255, np.uint8)
    cases = evaluate.pair_cases(2)
    plain = evaluate.render_draw(sprites, None)(cases)
    assert plain.shape == (2, 3, data.SIZE, data.SIZE)
    assert torch.equal(plain, evaluate.render_draw(sprites, None)(cases))
    assert evaluate.render_draw(sprites, vae.new_vae().eval())(cases).shape == plain.shape


def test_card_is_written_with_and_without_scores(tmp_path: Path) -> None:
    folder = tmp_path / "tinymoji"
    folder.mkdir()
    assert "Not measured yet" in cards.write_model_card(folder).read_text()
    part = evaluate.score([True, False])
    scores = {
        "single": part,
        "pair": part,
        "single style": part,
        "by style": {"flat": part},
        "by subject": {"dog": 0.25},
    }
    common.write_json(folder / "scores.json", {**scores, "fraction": 0.1, "steps": 20, "guidance": 4.0})
    common.write_json(folder / "training.json", {"rows": [[50, 1200, 1.0, 0.9, 1e-3], [100, 2400, 2.0, 0.5, 1e-3]]})
    common.write_json(folder / "learning-curve.json", {"50": {"samples": 1200, "single": part, "pair": part}})
    card = cards.write_model_card(folder).read_text()
    assert "50.0% (" in card
    assert "dog 25%" in card
    assert "2,400 samples" in card
    assert (folder / "curve.png").stat().st_size > 1000


def test_adapter_sets_hold_what_the_base_never_saw(tmp_path: Path) -> None:
    made = adapters.shipped_adapters()
    assert sum(a.kind == "concept" for a in made) >= 8
    assert sum(a.kind == "style" for a in made) >= 2
    concept = adapters.concept_scenes("fox", 6)
    assert {s.style for s in concept} == set(data.BASE_STYLES)
    assert all("fox" in s.caption for s in concept)
    style = adapters.style_scenes("monochrome", 20)
    assert len({s.subjects[0].concept for s in style}) == 20
    assert all(s.background != "black" and "monochrome" in s.caption for s in style)
    sprites = np.full((len(data.STYLES), len(data.CONCEPTS), 4, 4, 4), 255, np.uint8)
    adapters.write_folder(tmp_path / "fox", concept, sprites)
    assert len(list((tmp_path / "fox").glob("*.png"))) == len(list((tmp_path / "fox").glob("*.txt"))) == 6
    with pytest.raises(ValueError, match="base subjects"):
        adapters.style_scenes("3d", 1000)


def test_options_have_sensible_defaults() -> None:
    options: argparse.Namespace = base.parse([])
    assert sum(options.mix) == pytest.approx(1.0)
    assert 0 < base.seconds_until("12:00") <= 24 * 3600


@pytest.mark.usefixtures("vocabulary")
def test_training_can_begin_with_an_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "Model", SmallModel)
    source = SmallModel()
    source.text_encoder.save_pretrained(tmp_path / "text_encoder")
    source.unet.save_pretrained(tmp_path / "unet")
    run = base.Run(tmp_path / "run", torch.device("cpu"), 0.9)
    run.start_from(tmp_path)
    for a, b in zip(source.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a, b)
    run.average.copy_to(run.model)
    assert torch.equal(next(source.parameters()), next(run.model.parameters()))
    with pytest.raises(FileNotFoundError, match=r"assets\.build\.base"):
        base.latest(tmp_path / "none")


def test_cards_of_shipped_adapters_keep_their_order() -> None:
    made = (
        "# fox\n\n- Data digest: `ab`\n\n"
        "| prompt | without | with |\n|---|---|---|\n| a | ![w](s/a.png) | ![w](s/b.png) |\n\n"
        "```python\nfrom studio import library\nbase = 1\npipe('a fox', num_inference_steps=20).images[0]\n"
        "```\n\nMade with x\n"
    )
    first = adapters.judged_card(adapters.shipped_card(made), ["- Judged alone, subject recognised: 1"])
    again = adapters.judged_card(first, ["- Judged alone, subject recognised: 2"])
    assert again == (
        "# fox\n\n- Data digest: `ab`\n- Judged alone, subject recognised: 2\n\n"
        "```python\nfrom studio import library\n\nbase = 1\n"
        "pipe('a fox', num_inference_steps=20, height=64, width=64).images[0]\n```\n\n"
        "![samples](samples.png)\n\nMade with x\n"
    )
    old = (Path(adapters.SHIPPED) / "fox" / "card.md").read_text(encoding="utf-8")
    lines = [line for line in old.splitlines() if line.startswith("- Judged alone")]
    assert adapters.judged_card(old, lines) == old
