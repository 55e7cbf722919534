"""Cards that a hub accepts: front matter by its rules, and lines that run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from studio.training import cards, distill
from studio.training.schemas.distill import DistillConfig
from studio.training.tasks.image import run
from tests.training.conftest import settings


def front(card: str) -> dict[str, Any]:
    """The front matter, checked as the hub's own client checks it."""
    values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    assert ModelCardData(**values).to_dict() == values
    if "base_model" in values:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", values["base_model"])
    return values


def executed(card: str) -> dict[str, Any]:
    """What the snippet leaves, run in the folder it is written for."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), found)
    return found


def test_an_image_card_on_a_base_in_a_folder(
    bases: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(settings(bases("sd"), pictures, steps=1, trigger="zxq fox", name="fox v1"), tmp_path)
    card = Path(result["card"]).read_text(encoding="utf-8")
    values = front(card)
    assert values["instance_prompt"] == "zxq fox"
    assert values["library_name"] == "diffusers"
    assert {"lora", "text-to-image"} <= set(values["tags"])
    assert "base_model" not in values, "a folder is no id of a hub"
    assert str(bases("sd").parent) not in card
    (tmp_path / bases("sd").name).symlink_to(bases("sd"))  # where the reader has the base
    monkeypatch.chdir(tmp_path)
    found = executed(card)
    assert found["picture"].size == (32, 32)
    assert any("default_0" in getattr(module, "lora_A", {}) for module in found["pipe"].unet.modules())


def test_an_image_card_on_a_base_of_the_library(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    result = run(settings(Path("tinymoji"), pictures, steps=1, resolution=None), tmp_path / "run")
    card = Path(result["card"]).read_text(encoding="utf-8")
    assert front(card)["license"] == "apache-2.0"
    monkeypatch.chdir(tmp_path / "run")
    assert executed(card)["picture"].size == (64, 64)


@pytest.mark.parametrize("objective", ["guidance", "consistency"])
def test_a_distilled_card(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    wanted = {
        "base": str(bases("sd")), "prompts": str(tmp_path / "prompts.txt"), "objective": objective, "knots": 4,
        "trajectory_count": 2, "rank": 2, "steps": 1, "batch_size": 1, "resolution": 32, "device": "cpu",
        "inference_steps": 2, "name": "fast",
    }  # fmt: skip
    result = distill(DistillConfig.parse(wanted), folder=tmp_path)
    card = Path(result["card"]).read_text(encoding="utf-8")
    assert front(card)["library_name"] == "diffusers"
    (tmp_path / bases("sd").name).symlink_to(bases("sd"))
    monkeypatch.chdir(tmp_path)
    found = executed(card)
    assert found["picture"].size == (32, 32)
    assert (type(found["pipe"].scheduler).__name__ == "LCMScheduler") == (objective == "consistency")


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("owner/base", "owner/base"), ("tinymoji", ""),
        ("/data/models/base", ""), ("./owner/base", ""), ("~/owner", ""), ("a/b/c", ""),
    ],
)  # fmt: skip
def test_only_ids_of_the_hub_are_its_base_model(base: str, wanted: str) -> None:
    assert cards.hub_id(base) == wanted
    lines = cards.front_matter(base, "peft", ["lora"])
    assert front("\n".join(lines) + "\n").get("base_model", "") == wanted


def test_odd_words_stay_yaml() -> None:
    odd = "a: b # c\n--- 'x' \"y\" \u00e9"
    lines = cards.front_matter("tinymoji", "diffusers", ["lora"], instance_prompt=odd)
    assert front("\n".join(lines) + "\n")["instance_prompt"] == odd
