"""What is shipped: sizes, loading, notices."""

from pathlib import Path

import pytest

import assets

MODELS = Path(assets.__file__).parent / "models"
needs_model = pytest.mark.skipif(not (MODELS / "tinymoji").is_dir(), reason="the base model has not been exported here")
needs_tinydit = pytest.mark.skipif(not (MODELS / "tinydit").is_dir(), reason="tinydit has not been exported here")
needs_judge = pytest.mark.skipif(not (MODELS / "judge").is_dir(), reason="the judge has not been trained here")


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_path_finds_assets_and_refuses_others() -> None:
    assert assets.path("NOTICE").read_text("utf-8")
    with pytest.raises(FileNotFoundError, match="no asset"):
        assets.path("models/none")
    with pytest.raises(ValueError, match="relative"):
        assets.path("../README.md")


def test_notice_names_every_package() -> None:
    from assets.build import data

    notice = assets.path("NOTICE").read_text("utf-8")
    lines = [line.split() for line in notice.splitlines()]
    for name, version in data.PACKAGES.items():
        assert any(line[:2] == [name, version] for line in lines), name


@needs_model
def test_model_is_small_and_an_ordinary_pipeline() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    assert size(MODELS / "tinymoji") <= 40e6
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "tinymoji", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    first, second = (
        pipe("a flat icon of a dog", generator=torch.Generator().manual_seed(1), **kwargs).images for _ in range(2)
    )
    assert first.shape == (1, 64, 64, 3)
    assert (first == second).all()
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    names = [name for name, _ in pipe.unet.named_modules()]
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in names


@needs_tinydit
def test_tinydit_is_small_and_an_ordinary_pipeline() -> None:
    import torch
    from diffusers import ZImagePipeline

    assert sum(f.stat().st_size for f in (MODELS / "tinydit").rglob("*") if f.is_file()) <= 24e6
    pipe = ZImagePipeline.from_pretrained(MODELS / "tinydit", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "height": 64, "width": 128, "guidance_scale": 3, "output_type": "np"}
    first, second = (
        pipe("a flat icon of a dog", generator=torch.Generator().manual_seed(1), **kwargs).images for _ in range(2)
    )
    assert first.shape == (1, 64, 128, 3)
    assert (first == second).all()


@needs_tinydit
def test_tinydits_card_tells_its_scores() -> None:
    import json

    from assets.build import cards

    card = (MODELS / "tinydit" / "README.md").read_text("utf-8")
    scores = json.loads((MODELS / "tinydit" / "scores.json").read_text("utf-8"))
    assert all(cards.percent(scores[key]) in card for key in ("single", "pair", "single style"))
    steps, samples, *_ = json.loads((MODELS / "tinydit" / "training.json").read_text("utf-8"))["rows"][-1]
    assert f"{samples:,} samples ({steps:,} steps" in card


@needs_judge
def test_judge_is_small_and_accurate_by_its_own_record() -> None:
    import json

    from assets.build.judge import load_judge

    assert size(MODELS / "judge") <= 4e6
    assert len(load_judge().labels) >= 112
    facts = json.loads((MODELS / "judge" / "facts.json").read_text("utf-8"))
    assert facts["seen"][0] >= 0.95


needs_tinyrna = pytest.mark.skipif(not (MODELS / "tinyrna").is_dir(), reason="tinyrna has not been trained here")


@needs_tinyrna
def test_tinyrna_its_adapter_and_its_example_belong_together() -> None:
    """Stock transformers and PEFT open both; the example is scored, and its source is named."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from pipelines.genomics import fasta
    from pipelines.genomics.classifier import RnaClassifier

    base, adapter = MODELS / "tinyrna", MODELS.parent / "adapters" / "lncrna"
    assert size(base) + size(adapter) < 3e6
    assert size(base / "examples") < 1e6
    PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), adapter)
    records = list(fasta.read(base / "examples" / "demo.fa"))
    scores = RnaClassifier.open(base, adapter).score(records[:4])
    assert all(0 < score.probability < 1 for score in scores)
    notice = assets.path("NOTICE").read_text("utf-8")
    assert "transdecoder-doc   5.0.1" in notice
    assert "Neither the name of the Broad Institute" in notice
