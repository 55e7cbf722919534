"""tinydit's training: its forward against diffusers', the teacher's answers, exact resuming, the card."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import assets
from assets.build import base, cards, common, data, evaluate, export, flow, latents, lessons, text

needs_model = pytest.mark.skipif(
    not (Path(assets.__file__).parent / "models" / "tinymoji").is_dir(),
    reason="the base model has not been exported here",
)


def stirred(seed: int = 0) -> flow.Model:
    """An untrained model with every weight moved, so that no gate or answer is zero."""
    torch.manual_seed(seed)
    model = flow.Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make models of one layer, whose attention is taught."""
    monkeypatch.setattr(flow, "LAYERS", 1)
    monkeypatch.setattr(flow, "GROUNDED", (0,))


@needs_model
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("aspect", [1, 2])
def test_training_forward_is_that_of_diffusers(aspect: int) -> None:
    model = stirred()
    seen: list[torch.Tensor] = []
    noisy, times = torch.randn(3, 4, 16, 16 * aspect), torch.tensor([0.1, 0.5, 0.9])
    tokens, lengths = torch.randint(0, 2000, (3, flow.CAPTION)), torch.tensor([2, 20, flow.CAPTION])
    mask = torch.arange(flow.CAPTION) < lengths[:, None]
    with torch.no_grad():
        ours = model(noisy, times, tokens, lengths, flow.rotations(8, 8 * aspect), seen)
        states = model.text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        captions = [row[kept] for row, kept in zip(states[-2], mask, strict=True)]
        theirs = model.transformer(list(noisy[:, :, None].unbind()), times, captions, return_dict=False)[0]
    expected = torch.stack(theirs)[:, :, 0]
    assert expected.std() > 0.05
    assert torch.allclose(ours, expected, atol=1e-5)
    assert [told.shape for told in seen] == [(3, flow.HEADS, 64 * aspect, flow.CAPTION)]


@needs_model
@pytest.mark.usefixtures("small")
def test_pipeline_reads_captions_as_training_does() -> None:
    model = stirred()
    pipeline = flow.make_pipeline(model)
    captions = ["a flat icon of a dog left of a cat, blue background", ""]
    tokens = torch.from_numpy(text.encode(captions))[:, : flow.CAPTION]
    lengths = flow.caption_lengths(tokens, text.tokenizer().eos_token_id)
    with torch.no_grad():
        ours = model.words(tokens)
        theirs, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    assert [len(states) for states in theirs] == lengths.tolist()
    for row, length, states in zip(ours, lengths, theirs, strict=True):
        assert torch.allclose(row[:length], states, atol=1e-5)


@needs_model
@pytest.mark.usefixtures("small")
def test_pipeline_steps_along_the_trained_velocity() -> None:
    model = stirred()
    pipeline = flow.make_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    assert evaluate.guidance_for(pipeline) == evaluate.GUIDANCE - 1
    noise = torch.randn(1, 4, 16, 16)
    made = pipeline(
        "a dog", height=64, width=64, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="latent"
    )
    tokens = torch.from_numpy(text.encode(["a dog"]))[:, : flow.CAPTION]
    lengths = flow.caption_lengths(tokens, text.tokenizer().eos_token_id)
    with torch.no_grad():
        velocity = model(noise, torch.zeros(1), tokens, lengths, flow.rotations(8, 8))
    assert torch.allclose(made.images, noise + velocity, atol=1e-4)


def test_every_caption_fits() -> None:
    rng = np.random.default_rng(1)
    captions = [data.sample_scene(rng, (1, 1, 3), aspect=aspect).caption for aspect in (1, 2) for _ in range(300)]
    assert max(len(ids) for ids in text.tokenizer()(captions)["input_ids"]) <= flow.CAPTION


def test_patches_come_back() -> None:
    x = torch.randn(2, 4, 6, 10)
    assert torch.equal(flow.unpatch(flow.patches(x), 6, 10), x)


def test_teacher_levels_are_those_of_its_schedule() -> None:
    share = DDPMScheduler(**base.schedule_config()).alphas_cumprod
    sigmas = lessons.teacher_sigmas()
    assert torch.allclose(sigmas / (1 - sigmas), ((1 - share) / share).sqrt(), rtol=1e-4)


def test_velocity_from_v() -> None:
    x, e = torch.randn(2, 5, 4, 2, 2)
    s = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.93])[:, None, None, None]
    scale = 1 / ((1 - s) ** 2 + s**2).sqrt()
    v = (1 - s) * scale * e - s * scale * x  # the definition of v (Salimans and Ho 2022)
    assert torch.allclose(lessons.flow_from_v((1 - s) * x + s * e, v, s.flatten()), x - e, atol=1e-5)


def write_shard(folder: Path, aspect: int) -> None:
    """Write a shard of ``latents.SHARD`` random scenes."""
    rng = np.random.default_rng(aspect)
    folder.mkdir(parents=True)
    np.save(folder / "0000.npy", rng.standard_normal((latents.SHARD, 4, 16, 16 * aspect)).astype(np.float16))
    scenes = [data.sample_scene(rng, (1, 1, 1), aspect=aspect) for _ in range(latents.SHARD)]
    lines = [json.dumps(asdict(scene)) for scene in scenes]
    (folder / "0000.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def school(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One lesson on square scenes and one on wide ones, by a teacher who answers zero."""
    monkeypatch.setattr(latents, "SHARD", 64)
    folders = {1: tmp_path / "shards", 2: tmp_path / "shards" / "2x1"}
    monkeypatch.setattr(latents, "shard_folder", lambda aspect=1: folders[aspect])
    teacher = SimpleNamespace(
        sigmas=torch.tensor([0.02, 0.9]), velocity=lambda noisy, sigmas, tokens: torch.zeros_like(noisy)
    )
    for aspect, folder in folders.items():
        write_shard(folder, aspect)
        lessons.give_lesson(teacher, folder / "0000.npy", 0, lessons.lesson_folder(aspect) / "00-0000.npy")
    return tmp_path


@needs_model
def test_lessons_hold_the_teachers_answer_or_the_data(school: Path) -> None:
    clean, _ = latents.load_shard(school / "shards" / "0000.npy")
    both = np.load(lessons.lesson_folder() / "00-0000.npy").astype(np.float32)
    sigmas, emptied = np.load(lessons.lesson_folder() / "00-0000.facts.npy").T
    asked = (sigmas >= 0.02) & (sigmas <= 0.9)
    assert 0 < (~asked).sum() < 20
    assert (both[asked, 1] == 0).all()
    s = sigmas[~asked, None, None, None]
    noise = (both[~asked, 0] - (1 - s) * clean[~asked]) / s
    assert np.abs(both[~asked, 1] - (clean[~asked] - noise)).max() < 0.02
    drawn = flow.Lessons(1).draw(np.random.default_rng(0), 200, (0, 1, 0))
    picture = (200, 4, 16, 16)
    caption, scene = (200, flow.CAPTION), (200, 3)
    shapes = [tuple(part.shape) for part in drawn]
    assert shapes == [picture, picture, (200,), caption, (*scene, flow.CAPTION), (*scene, 4)]
    blank = (drawn[3].numpy() == text.encode([""])[0, : flow.CAPTION]).all(1)
    assert 0 < emptied.sum() < 20
    named = drawn[4].any(-1).sum(1)
    assert (named[blank] == 0).all()
    assert (named[~blank] == 2).all()
    assert flow.Lessons(2).draw(np.random.default_rng(0), 2, (1, 1, 1))[0].shape == (2, 4, 16, 32)


@needs_model
@pytest.mark.usefixtures("small", "school")
def test_interrupted_training_goes_on_exactly(tmp_path: Path) -> None:
    def train(folder: str, *limits: int) -> base.Run:
        for limit in limits:
            flow.main([
                "--max-steps", str(limit), "--batch", "2", "--dtype", "fp32", "--warm-steps", "1", "--wide", "0.5",
                "--folder", str(tmp_path / folder),
            ])  # fmt: skip
        return flow.Run(tmp_path / folder, torch.device("cpu"), 0.9)

    whole, parts = train("whole", 2), train("parts", 1, 2)
    assert parts.step == 2
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in whole.average.values.items():
        assert torch.equal(value, parts.average.values[name])
    begun = torch.load(tmp_path / "parts" / "average-000001.pt", weights_only=True)["values"]
    assert not torch.equal(
        begun["transformer.layers.0.attention.to_q.weight"],
        whole.average.values["transformer.layers.0.attention.to_q.weight"].half(),
    )


def test_training_without_lessons_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latents, "shard_folder", lambda aspect=1: tmp_path / str(aspect))
    with pytest.raises(FileNotFoundError, match=r"assets\.build\.lessons"):
        flow.open_lessons()


def test_card_says_what_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "tinydit"
    folder.mkdir()
    single, pair = evaluate.score([True, False]), evaluate.score([True, True, False])
    scores = {
        "single": single, "pair": pair, "single style": single, "by style": {}, "by subject": {"dog": 0.25},
        "fraction": 1, "steps": 20, "guidance": 3.0, "sampler": "Euler on the flow",
    }  # fmt: skip
    common.write_json(folder / "scores.json", scores)
    run = {"rows": [[50, 1200, 1.0, 0.9, 1e-3]], "lesson rows": {"1": 4096, "2": 64}}
    common.write_json(folder / "training.json", run)
    card = cards.write_model_card(folder).read_text()
    assert "# tinydit" in card
    assert "ZImagePipeline" in card
    assert f"| {cards.percent(pair)} |" in card
    assert "Euler on the flow, 20 steps, guidance 3," in card
    assert "1,200 samples (50 steps" in card
    assert "4,096 noisy scenes and 64 wide ones" in card


@needs_model
@pytest.mark.usefixtures("small")
def test_export_shares_the_autoencoder_and_opens_in_diffusers(tmp_path: Path) -> None:
    import shutil

    from diffusers import ZImagePipeline

    shutil.copytree(assets.path("models/tinymoji/vae"), tmp_path / "tinymoji" / "vae")
    model = stirred()
    folder = export.export(flow.make_pipeline(model), tmp_path / "tinydit")
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_symlink()
    again = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for name, value in model.transformer.half().state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value.float())
    assert again.vae.config.shift_factor == 0.0
