"""Classifier training and its federation, on the shipped sample: a Mixer of our own, rows of tiles, private steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import assets
from adapters.errors import InputError, MissingDependencyError
from pipelines.vision.loading import known_labels, open_classifier
from pipelines.vision.mixer import MixerConfig, MixerForImageClassification, from_timm
from studio.datasets.labelled_pictures import labelled
from studio.datasets.texts import scan
from studio.federation import engine, private
from studio.federation.schema import FederateConfig
from studio.training.labelled_rows import read
from studio.training.schemas.classifier import TrainClassifierConfig
from studio.training.tasks.classifier import run

LABELS = ["animal", "clock", "clothing", "face", "food", "hand", "heart", "object", "person", "place", "plant",
          "symbol", "transport", "weather"]  # fmt: skip


@pytest.fixture(scope="session")
def sample() -> Path:
    return Path(assets.path("federated/rows.jsonl"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained ViT and an untrained Mixer of the sample's labels."""
    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8, **names}
    ViTForImageClassification(ViTConfig(num_attention_heads=2, intermediate_size=32, **sizes)).save_pretrained(
        folder / "vit"
    )
    MixerForImageClassification(MixerConfig(**sizes)).save_pretrained(folder / "mixer")
    return {"vit": folder / "vit", "mixer": folder / "mixer"}


def federation(base: Path, data: Path, **changes: object) -> FederateConfig:
    values = {
        "name": "shared", "rounds": 1, "train": "classifier", "data": str(data), "partition": "column", "by": "domain",
        "test_by": "code", "test_share": 0.3, "training": {
            "base": str(base), "rank": 4, "steps": 3, "batch_size": 16, "device": "cpu", "learning_rate": 1e-2,
            "max_grad_norm": 0.0, "lr_schedule": "constant",
        },
    }  # fmt: skip
    return FederateConfig.parse({**values, **changes})


def test_mixer_is_timms_with_transformers_ways(bases):
    """Names and sizes as in timm's mixer_b16_224 (59.9 M parameters), read and written by transformers."""
    with torch.device("meta"):
        large = MixerForImageClassification(from_timm("mixer_b16_224", 1000))
    assert sum(p.numel() for p in large.parameters()) == 59_880_472
    names = {name for name, _ in large.named_parameters()}
    assert {"stem.proj.weight", "blocks.11.mlp_tokens.fc1.weight", "blocks.0.mlp_channels.fc2.bias", "norm.weight",
            "head.weight"} <= names  # fmt: skip
    assert from_timm("vit_b16_224", 10) is None
    opened = open_classifier(str(bases["mixer"]), LABELS, "fp32")
    assert known_labels(str(bases["mixer"])) == opened.labels == LABELS
    assert opened.pixels(Image.new("RGB", (64, 64), "white")).shape == (3, 32, 32)
    model = opened.model.eval()
    x = torch.randn(2, 3, 32, 32)
    # the tokens are mixed: a change in one patch reaches the answer through all, and channels keep their places
    block = model.blocks[0]
    tokens = model.stem(x)
    by_hand = tokens + (block.mlp_tokens(block.norm1(tokens).transpose(1, 2))).transpose(1, 2)
    by_hand = by_hand + block.mlp_channels(block.norm2(by_hand))
    torch.testing.assert_close(model(pixel_values=x).logits, model.head(model.norm(by_hand).mean(1)))


def test_rows_of_tiles(sample, tmp_path):
    rows = labelled(scan(str(sample)))
    assert len(rows) == 252
    assert rows[0].open().size == (32, 32)
    assert rows[0].open().tobytes() != rows[1].open().tobytes()
    place = tmp_path / "rows.jsonl"
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")

    def refused(words, *lines, **more):
        place.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(InputError, match=words):
            labelled(scan(str(place)), **more)[0].open()

    refused("no column of labels", {"image": "a.png"})
    refused("line 1: 'b.png' does not exist", {"image": "b.png", "label": "x"})
    refused("has no tile 2", {"image": "a.png", "label": "x", "tile": 2})
    refused("number from 0", {"image": "a.png", "label": "x", "tile": -1})
    place.write_text("".join(json.dumps({"image": "a.png", "label": label}) + "\n" for label in "xx"))
    with pytest.raises(InputError, match="only one label"):
        read(TrainClassifierConfig(base=str(tmp_path), data=str(place)))
    with pytest.raises(InputError, match="There is no classifier 'nothing'"):
        read(TrainClassifierConfig(base="nothing", data=str(sample)))
    with pytest.raises(InputError, match=r"'animal' of the data is not in labels"):
        read(TrainClassifierConfig(base=str(tmp_path), data=str(sample), labels=["face", "food"]))


def test_a_trained_classifier_is_an_ordinary_adapter(bases, sample, tmp_path):
    values = {"base": str(bases["vit"]), "data": str(sample), "name": "look", "steps": 4, "rank": 2, "device": "cpu"}
    result = run(TrainClassifierConfig(**values, validation_split=0.2), tmp_path)
    assert set(result["validation"][-1]) == {"step", "validation_loss", "accuracy"}
    model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(bases["vit"]), result["adapter"])
    names = {name for name, _ in model.named_parameters()}
    assert any("q_proj.lora_A" in name or "query.lora_A" in name for name in names)
    assert any("classifier.modules_to_save" in name for name in names)
    assert "ViTForImageClassification" in Path(result["card"]).read_text()
    assert Path(result["adapter"], "README.md").is_file()


def test_a_mixer_is_trained_by_three_clients_with_a_style_each(bases, sample, tmp_path):
    result = engine.run(federation(bases["mixer"], sample, method="lora-fair"), tmp_path)
    history = engine.read_history(tmp_path)[-1]
    assert set(history["clients"]) == {"fluent-emoji-flat", "fluent-emoji-high-contrast", "noto"}
    assert {layer for layer in history["layers"] if "mlp" in layer} == set(history["layers"])
    assert all(found["bias"] < found["before"] for found in history["layers"].values() if found["before"] > 0)
    assert 0 <= result["measures"]["accuracy"] <= 1
    model = PeftModel.from_pretrained(
        MixerForImageClassification.from_pretrained(bases["mixer"]), result["adapter"]
    )
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 14)


@pytest.mark.parametrize("method", ["flora", "fed-sb"])
def test_rules_that_begin_otherwise_share_the_new_head_as_well(bases, sample, tmp_path, method):
    changes = {"rounds": 2, "evaluate_every": 0, "training": {**federation(bases["vit"], sample).training, "steps": 1}}
    result = engine.run(federation(bases["vit"], sample, method=method, **changes), tmp_path)
    assert not any(record["failed"] for record in engine.read_history(tmp_path))
    plain = ViTForImageClassification.from_pretrained(bases["vit"])
    before = plain.classifier.weight.detach().clone()
    model = PeftModel.from_pretrained(plain, result["adapter"])
    assert not torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, before)


# ------------------------------------------------------------------------------------------------ privacy


def test_private_rounds_keep_one_account(bases, sample, tmp_path, monkeypatch):
    pytest.importorskip("opacus", reason="sample-level privacy is Opacus' (extra private)")
    monkeypatch.setattr(private, "sigma_for", lambda epsilon, delta, q, steps: 1.3)
    config = federation(bases["vit"], sample, method="ffa-lora", privacy="sample", delta=1e-3, evaluate_every=0)
    result = engine.run(config, tmp_path)
    history = engine.read_history(tmp_path)
    file = tmp_path / "clients/noto/privacy.json"
    q, examples = json.loads(file.read_text())["q"], int(history[-1]["clients"]["noto"]["examples"])
    assert q == 16 / examples
    assert result["epsilon"] == max(history[-1]["epsilon"].values())
    assert history[-1]["epsilon"]["noto"] == pytest.approx(private.epsilon_of([(1.3, q, 3)], 1e-3))
    kept = json.loads(file.read_text()) | {"rounds": 2}
    file.write_text(json.dumps(kept))
    second = private.Guard(3.0, 1e-3, 1.0, 2, 2, file)
    batches = second.batches(examples, 16, 3)
    assert batches == private.Guard(3.0, 1e-3, 1.0, 2, 2, file).batches(examples, 16, 3)
    assert second.history == [(1.3, q, 3), (1.3, q, 3)]
    assert second.spent() == pytest.approx(private.epsilon_of([(1.3, q, 6)], 1e-3), rel=1e-3)
    with pytest.raises(InputError, match="chosen for 2 rounds, and they are spent"):
        private.Guard(3.0, 1e-3, 1.0, 2, 3, file).batches(examples, 16, 3)
    with pytest.raises(InputError, match="privacy: clip changed"):
        private.Guard(3.0, 1e-3, 2.0, 2, 2, file).batches(examples, 16, 3)


def test_accountant_and_bad_private_settings(tmp_path, bases, sample, monkeypatch):
    pytest.importorskip("opacus", reason="sample-level privacy is Opacus' (extra private)")
    assert private.epsilon_of([(1.0, 0.02, 500)], 1e-5, "rdp") == pytest.approx(3.144, abs=0.002)
    assert private.epsilon_of([(1.0, 0.02, 500)], 1e-5) == pytest.approx(2.784, abs=0.03)
    guard = private.Guard(1.0, 0.1, 1.0, 1, 1, tmp_path / "p.json")
    with pytest.raises(InputError, match="fewer than batch_size"):
        guard.batches(8, 16, 1)
    with pytest.raises(InputError, match=r"delta 0\.1 must be below 1 / 20"):
        guard.batches(20, 4, 1)
    config = federation(bases["vit"], sample, privacy="sample")
    training = TrainClassifierConfig(base="x", data="y", gradient_accumulation=2)
    with pytest.raises(InputError, match="gradient_accumulation to be 1"):
        private.check(config, training)
    with pytest.raises(InputError, match="for language models and classifiers"):
        private.check(config.model_copy(update={"train": "image"}), object())
    monkeypatch.setattr(private.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"adapter-studio\[private\]"):
        private.check_installed()


def test_private_gradients_are_clipped_means_of_single_examples_with_noise(tmp_path):
    """Without noise and with a huge C the step is the plain one; with a small C every example's gradient is clipped."""
    pytest.importorskip("opacus", reason="sample-level privacy is Opacus' (extra private)")
    from adapters.plugin import Answers, Handles

    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))

    def gradients(clip: float, sigma: float) -> torch.Tensor:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = private.Guard(1.0, 1e-5, clip, 1, 1, tmp_path / "unused.json")
        guard.kept = {"sigma": sigma, "secret": "1f", "q": 1.0, "steps": 1, "done": {}}
        guard._expected = 6
        guard.after_inject(Handles({"model": model}, optimizer))
        logits = model(x)
        loss, _ = guard.loss(logits.sum(), Answers(logits, y, lambda: logits, shifted=False))
        loss.backward()
        guard.grads_ready(0)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def single(n: int) -> torch.Tensor:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        torch.nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    each = torch.stack([single(n) for n in range(6)])
    torch.testing.assert_close(gradients(1e6, 0.0), each.mean(0), rtol=1e-4, atol=1e-6)
    norms = each.norm(dim=1, keepdim=True)
    clip = float(norms.median()) * 0.9
    torch.testing.assert_close(gradients(clip, 0.0), (each * (clip / norms).clamp(max=1)).mean(0), rtol=1e-4, atol=1e-6)
    noise = (gradients(clip, 50.0) - gradients(clip, 0.0)) * 6 / (50.0 * clip)
    assert 0.6 < float(noise.std()) < 1.4
    tokens = torch.tensor([[5, 1, -100], [-100, 2, 2]])
    found = private.losses(torch.zeros(2, 3, 7), tokens, shifted=True)
    torch.testing.assert_close(found, torch.log(torch.tensor([7.0, 7.0])))
