"""Pictures over HTTP: several requests in one batch are those that the pipeline makes by itself."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from pipelines.language.loading import open_model
from studio.serving.app import create_app
from studio.serving.engine import ServeConfig
from studio.serving.pictures import PictureService
from studio.serving.service import ServeEngine

ASKS = [("a fox", {"fox": 1.0}, 1), ("a robot on white", {"robot": 0.8}, 2), ("a cactus", {}, 3),
        ("a fox and a robot", {"fox": 0.6, "robot": 0.6}, 4)]  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def drawing() -> PictureService:
    return PictureService.open("tinymoji", "cpu", "auto", [])


def seen(answer: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB"), float)


def test_requests_with_different_adapters_are_one_batch_and_each_its_own_picture(base, drawing):
    """Against the pipeline alone, one picture after the other; differences are rounding."""
    app = create_app(ServeEngine(open_model(base), "tiny", ServeConfig(pool_pages=900)), None, drawing)
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:

        def ask(prompt: str, weights: dict[str, float], seed: int, **more: object) -> dict:
            used = [{"name": name, "weight": weight} for name, weight in weights.items()]
            body = {"prompt": prompt, "seed": seed, "steps": STEPS, "adapters": used} | more
            return client.post("/v1/images/generations", json=body).json()

        first = pool.submit(ask, "a snowman", {}, 9)  # keeps the drawer busy while the others arrive
        made = [seen(found) for found in pool.map(lambda one: ask(*one), ASKS)]
        first.result()
        assert max(drawing.batches) > 1
        refused = [ask("x", {"foz": 1.0}, 1), ask("x", {}, 1, size="wide"), ask("x", {}, 1, quality="hd"),
                   ask("x", {}, 1, n=0), ask("x", {}, 1, size="99999x99999")]  # fmt: skip
        region = ask("icons", {}, 1, regions=[{"box": [0, 0, 0.5, 1], "adapters": ["fox"], "prompt": "a fox"}])
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert [set(one) for one in refused] == [{"error"}] * 5
    assert "did you mean 'fox'" in refused[0]["error"]["message"]
    assert "million pixels" in refused[4]["error"]["message"]
    assert seen(region).shape == made[0].shape
    assert {"tinymoji", "tinymoji:fox"} <= set(listed)
    for (prompt, weights, seed), picture in zip(ASKS, made, strict=True):
        drawing.pipe.compose("merge", list(weights), fold=False)
        with drawing.pipe.rack.at({name: (weight, weight) for name, weight in weights.items()}):
            alone = drawing.pipe(prompt, steps=STEPS, seed=seed).images[0]
        assert np.abs(picture - np.asarray(alone.convert("RGB"), float)).max() <= 2
