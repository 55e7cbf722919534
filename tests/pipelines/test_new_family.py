"""A family is one file: a package with one module and an entry point is a family everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULE = '''
"""PixArt Sigma: cross-attention to T5's tokens, whose encoding has a mask."""
from pipelines.diffusion.families import miniature
from pipelines.diffusion.families.base import Denoiser, Family, Layout, Signature


class PixArt(Family):
    name, title, short, order, licence = "pixart", "PixArt Sigma", "PixArt", 990, "OpenRAIL++"
    pipeline = "PixArtSigmaPipeline"
    components = ("vae", "transformer", "text_encoder")
    denoisers = (Denoiser("transformer"),)
    text_encoders = ()
    batch_arguments = ("encoder_hidden_states", "encoder_attention_mask", "timestep")
    text_arguments = {("encoder_hidden_states",): "embeds", ("encoder_attention_mask",): "mask"}
    call_names = {"embeds": "prompt_embeds", "mask": "prompt_attention_mask"}
    always = {"use_resolution_binning": False, "negative_prompt": None}
    layout = Layout(patch=2)
    predictions = ("epsilon",)
    signature = Signature(adapter="caption_projection", checkpoint="adaln_single", precedence=99)

    def encode(self, pipe, prompt, negative, images, guided):
        embeds, mask, other, other_mask = pipe.encode_prompt(prompt, guided, negative or "", images)
        return self.encoding({"embeds": embeds, "mask": mask}, {"embeds": other, "mask": other_mask}, guided)

    def condition(self, pipe, texts):
        embeds, mask, _, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)
        return {"embeds": embeds, "mask": mask}

    def predict(self, pipe, denoiser, noisy, times, given, guidance):
        return denoiser(noisy, given["embeds"].to(noisy.dtype), times, {"resolution": None, "aspect_ratio": None},
                        encoder_attention_mask=given["mask"], return_dict=False)[0]

    def tiny(self, seed=0, **changes):
        import torch

        torch.manual_seed(seed)
        transformer = miniature.make(
            "PixArtTransformer2DModel", sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=32, **changes)
        return miniature.quiet(miniature.make(
            "PixArtSigmaPipeline", tokenizer=miniature.t5_tokenizer(), text_encoder=miniature.t5(),
            vae=miniature.vae(), transformer=transformer, scheduler=miniature.ddim()))


FAMILY = PixArt()
'''

USE = """
import sys, torch
from pathlib import Path

from pipelines.diffusion.families import FAMILIES, detect, family_of
from studio import library
from studio.library import base_families, facts
assert list(FAMILIES)[-1] == "pixart" and base_families.written("pixart") == "PixArt"
pipe = FAMILIES["pixart"].tiny()
folder = Path(sys.argv[1])
pipe.save_pretrained(folder / "base")
assert detect(folder / "base").name == facts.base(folder / "base")["family"] == "pixart"

from adapters.formats import LoraFile
import re
from safetensors.torch import save_file
linear = {n: m.weight.shape for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
chosen = {n: s for n, s in linear.items() if re.fullmatch(r".*(to_[qkv]|linear_1)", n)}
for name in ("a", "b"):
    layers = {}
    for module, (out, into) in chosen.items():
        layers[f"transformer.{module}.lora_A.weight"] = torch.randn(2, into) * 0.3
        layers[f"transformer.{module}.lora_B.weight"] = torch.randn(out, 2) * 0.3
    save_file(layers, folder / f"{name}.safetensors")
assert facts.adapter(folder / "a.safetensors")["family"] == "pixart"

from studio.composition.schema import ModelChoice
assert ModelChoice.parse({"family": "pixart"}, source="x").family == "pixart"

from pipelines.diffusion import MultiLoRAPipeline
composer = MultiLoRAPipeline(pipe)
call = {"steps": 2, "width": 32, "height": 32, "output_type": "latent"}
plain = composer("a cat", **call).images
composer.load_lora(folder / "a.safetensors")
assert not torch.equal(plain, one := composer("a cat", **call).images)
composer.load_lora(folder / "b.safetensors")
both = composer.compose("composite")("a cat", **call).images
assert torch.isfinite(both).all() and not torch.equal(one, both)

from studio.training.families import family_of as bound
base = bound(pipe)
noisy, given = torch.randn(2, 4, 16, 16), base.condition(["a", "b"])
assert base.predict(base.denoiser, noisy, torch.tensor([0.1, 0.7]), given).shape == noisy.shape
from studio.training.inject import find_targets
from studio.training.schemas.image import TrainImageConfig
chosen = TrainImageConfig.parse({"data": str(folder), "trigger": "x", "family": "pixart"})
assert any("attn1.to_q" in name for name in find_targets(base.denoiser, chosen, False, base.about.targets).all)
print("ok")
"""


@pytest.mark.journey
def test_a_family_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "pixart_family.py").write_text(MODULE, encoding="utf-8")
    info = tmp_path / "pixart_family-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pixart-family\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[adapter_studio.families]\npixart = pixart_family\n", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip().endswith("ok"), result.stderr


def test_descriptions_need_no_model_code() -> None:
    code = (
        "import sys; from pipelines.diffusion.families import FAMILIES, of_adapter, of_checkpoint;"
        "from studio.library import base_families;"
        "assert len(FAMILIES) >= 4 and of_checkpoint(['cond_stage_model.x']).name == 'sd';"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
