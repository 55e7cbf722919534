"""Federated style LoRAs: clients with folders of pictures train a diffusion base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import assets
from adapters.errors import InputError
from adapters.formats import read
from studio.federation import engine
from studio.federation.clients import check
from studio.federation.schema import FederateConfig
from tests import tiny


@pytest.mark.slow
def test_two_artists_folders_make_one_style(tmp_path):
    rows = [json.loads(line) for line in Path(assets.path("federated/rows.jsonl")).read_text().splitlines()]
    for domain in ("noto", "fluent-emoji-flat"):
        strip = Image.open(assets.path(f"federated/{domain}.png"))
        (tmp_path / domain).mkdir()
        for row in [one for one in rows if one["domain"] == domain][:3]:
            tile = strip.crop((32 * row["tile"], 0, 32 * row["tile"] + 32, 32))
            tile.resize((64, 64)).save(tmp_path / domain / f"{row['tile']}.png")
            (tmp_path / domain / f"{row['tile']}.txt").write_text(f"a {row['label']}")
    base = tiny.saved("sd", tmp_path)
    clients = [{"name": name, "data": str(tmp_path / name)} for name in ("noto", "fluent-emoji-flat")]
    training = {"base": str(base), "mode": "style", "trigger": "emj", "rank": 2, "steps": 1, "batch_size": 1,
                "resolution": 64, "device": "cpu"}  # fmt: skip
    config = FederateConfig.parse({
        "name": "both", "method": "fedex-lora", "rounds": 1, "train": "image", "training": training, "clients": clients,
    })  # fmt: skip
    check(config)
    result = engine.run(config, tmp_path / "run")
    file = read(Path(result["adapter"]))
    ranks = {layer.rank for _, _, layer in file.layers()}
    assert ranks == {4}  # the mean, and the residual of two clients
    assert any(bool(layer.B.any()) for _, _, layer in file.layers())
    with safe_open(result["adapter"], "pt") as opened:
        recipe = json.loads(opened.metadata()["adapter_studio_recipe"])
    assert recipe["training"]["federated"]["clients"] == 2
    assert recipe["triggers"] == ["emj"]
    trained = engine.read_history(tmp_path / "run")[1]["clients"]
    assert {name: values["examples"] for name, values in trained.items()} == {"noto": 3.0, "fluent-emoji-flat": 3.0}
    assert torch.isfinite(torch.tensor(trained["noto"]["loss"]))
    with pytest.raises(InputError, match="not measured on test data"):
        check(config.model_copy(update={"clients": [config.clients[0].model_copy(update={"test": "x"})]}))
