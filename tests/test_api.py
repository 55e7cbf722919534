"""``import studio``: lazy, typed, with the errors of the jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import assets
import studio
from adapters.errors import InputError
from tests.language import tiny

MODELS = Path(assets.__file__).parent / "models"
needs_model = pytest.mark.skipif(not (MODELS / "tinymoji").is_dir(), reason="the base model has not been exported here")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))


def test_importing_it_loads_nothing_heavy() -> None:
    program = (
        "import studio, sys; assert studio.__version__; "
        "print([m for m in ('torch', 'diffusers', 'gradio', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_it_offers_is_there_and_nothing_else() -> None:
    for name in studio.__all__:
        assert getattr(studio, name)
    assert set(studio.__all__) <= set(dir(studio))
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        studio.paint  # noqa: B018


def test_a_function_keeps_its_name_after_the_modules_of_the_same_feature_are_imported() -> None:
    import studio.composition.job
    import studio.conversation.session

    assert callable(studio.compose)
    assert callable(studio.chat)


@needs_model
def test_compose_equals_the_pipeline_to_the_bit() -> None:
    picture = studio.compose("a cartoon icon of a fox", ["fox:0.7"], steps=2, seed=3)[0]
    pipe = studio.load("tinymoji")
    pipe.load_lora(assets.path("adapters/fox/fox.safetensors"), weight=0.7)
    again = pipe("a cartoon icon of a fox", steps=2, seed=3, guidance_scale=4.0).images[0]  # measured for tinymoji
    assert picture.tobytes() == again.tobytes()
    assert json.loads(picture.info["adapter-studio"])["config"]["adapters"][0]["weight"] == 0.7


@needs_model
def test_compose_keeps_pictures_in_a_folder_when_asked(tmp_path: Path) -> None:
    pictures = studio.compose("a fox", steps=1, images=2, folder=tmp_path / "kept")
    assert len(pictures) == 2
    assert sorted(file.name for file in (tmp_path / "kept").glob("*.png")) == ["picture-0.png", "picture-1.png"]


def test_wrong_values_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stepz"):
        studio.compose("a fox", stepz=3)
    with pytest.raises(InputError, match="nobody-has-this"):
        studio.compose("a fox", ["nobody-has-this"], steps=1)
    with pytest.raises(InputError, match=r"no training of kind 'imagee' \(did you mean 'image'"):
        studio.train("imagee", folder=tmp_path)
    with pytest.raises(InputError, match="There is no preset 'concept': choose quick"):
        studio.train("language", folder=tmp_path, preset="concept", data="rows.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        studio.reconstruct(["a.png"], folder=tmp_path / "file" / "below")
    with pytest.raises(InputError, match="name or path"):
        studio.chat("hello", [{"path": "x"}])


def test_chat_answers_and_repeats(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    once = studio.chat("red1?", base=base, max_tokens=6)
    assert once == studio.chat([{"role": "user", "content": "red1?"}], base=base, max_tokens=6)
