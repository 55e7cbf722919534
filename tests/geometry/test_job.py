"""The job and the command on the shipped model and scene, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import assets
from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from studio import reconstruct
from studio.schemas.reconstruct import ReconstructConfig

PICTURES = sorted(str(file) for file in assets.path("scenes/room").glob("*.png"))[::2]


def config(**values: Any) -> ReconstructConfig:
    return ReconstructConfig(**{"images": PICTURES, "steps": 6, "epochs": 1, "device": "cpu", **values})


def test_calibrate_then_use_the_adapter_again_and_export_anew(tmp_path: Path) -> None:
    done = reconstruct.run(config(calibrate=True, rank=2), tmp_path / "a", Silent())
    assert (done["images"], done["pairs"], done["encodings"]) == (4, 12, 4)
    scene = json.loads((tmp_path / "a/adapter/scene.json").read_text())
    assert len(scene["images"]) == 4
    assert scene["base"]["licence"] == "Apache-2.0"
    again = reconstruct.run(config(adapter=done["adapter"]), tmp_path / "b", Silent())
    assert [c["focal"] for c in again["cameras"]] == [c["focal"] for c in done["cameras"]]
    for kind in ("ply", "colmap", "nerfstudio", "npz"):
        place, points = reconstruct.export(done["scene"], tmp_path / f"x-{kind}", kind, percentile=50)
        assert place.exists()
        assert points > 0


class _StopAtPairs(Silent):
    stop = False

    def report(self, progress: Progress) -> None:
        self.stop = progress.stage == "align"

    def cancelled(self) -> bool:
        return self.stop


def test_a_cancelled_job_leaves_no_half_written_file(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        reconstruct.run(config(), tmp_path, _StopAtPairs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": []}, "no pictures"),
        ({"images": PICTURES[:2], "calibrate": True}, "three pictures or more"),
        ({"images": ["nowhere.png"]}, "no picture 'nowhere.png'"),
        ({"model": "naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt"}, "accept-licence"),
        ({"calibrate": True, "adapter": "x"}, "not both"),
        ({"adapter": "nowhere"}, "holds no PEFT adapter"),
        ({"graph": "star"}, "Unknown pair graph"),
    ],
)
def test_bad_input_is_a_sentence(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        reconstruct.run(config(**values), tmp_path, Silent())


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_pictures_work_without_alignment(count: int, tmp_path: Path) -> None:
    done = reconstruct.run(config(images=PICTURES[:count]), tmp_path, Silent())
    assert Path(done["glb"]).read_bytes()[:4] == b"glTF"
    assert done["loss"] is None
