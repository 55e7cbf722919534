"""What is known to fail is told before a job is made: by every command, the pages and Python alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import studio
from adapters.errors import InputError
from pipelines.diffusion.families import FAMILIES
from studio import jobs
from studio.cli.app import run as command
from tests.training import bed
from ui.components import schema_form
from ui.pages import distill, language, train

Place = Callable[[str], str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Paths of good and bad data by name; the studio has a home of its own."""
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    bed.crosses(tmp_path / "pictures", count=2)
    bed.crosses(tmp_path / "uncaptioned", count=2, captions=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (tmp_path / "odd.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "prompts.txt").write_text("a dog\n")
    (tmp_path / "blank.txt").write_text("\n")
    return lambda name: str(tmp_path / name)


IMAGE = {"data": "pictures", "trigger": "zxq"}
LANGUAGE = {"data": "rows.jsonl"}
DISTILL = {"prompts": "prompts.txt"}
WRONG = [
    ("image", {**IMAGE, "data": "nowhere"}, "does not exist"),
    ("image", {**IMAGE, "data": "empty"}, "There are no pictures"),
    ("image", {**IMAGE, "data": "uncaptioned", "mode": "captioned"}, "have no caption"),
    ("image", {**IMAGE, "base": "nobody"}, "no base model 'nobody'"),
    ("image", {**IMAGE, "base": "smollm2"}, "is a language model"),
    ("image", {**IMAGE, "continue_from": "nobody"}, "no adapter 'nobody'"),
    ("image", {**IMAGE, "validation_split": 0.9}, "leaves none of the 2 pictures"),
    ("image", {**IMAGE, "prior_preservation": True, "class_prompt": "a cat", "class_data": "empty"}, "are no pictures"),
    ("image", {**IMAGE, "cache_folder": "rows.jsonl"}, "is a file"),
    ("image", {**IMAGE, "tracker": "comet_ml"}, "is not installed"),
    ("image", {**IMAGE, "sample_prompts": ["a {thing}"]}, "found {thing}"),
    ("language", {**LANGUAGE, "data": "nowhere.jsonl"}, "does not exist"),
    ("language", {**LANGUAGE, "data": "odd.jsonl"}, "colour"),
    ("language", {**LANGUAGE, "prompt_column": "question"}, "question"),
    ("language", {**LANGUAGE, "validation_data": "nowhere.jsonl"}, "does not exist"),
    ("language", {**LANGUAGE, "base": "nobody"}, "no base model 'nobody'"),
    ("language", {**LANGUAGE, "base": "tinymoji"}, "draws pictures"),
    ("language", {**LANGUAGE, "chat_template": "nowhere.jinja"}, "neither 'chatml' nor a readable"),
    ("distill", {**DISTILL, "prompts": "nowhere.txt"}, "cannot be read"),
    ("distill", {**DISTILL, "prompts": "blank.txt"}, "There are no prompts"),
    ("distill", {**DISTILL, "base": "nobody"}, "no base model 'nobody'"),
    ("distill", {**DISTILL, "styles": ["nobody:0.5"]}, "no adapter 'nobody'"),
]
PATHS = {"data", "class_data", "cache_folder", "prompts", "validation_data", "chat_template"}
KINDS = {"image": "train-image", "language": "train-language", "distill": "distill"}


@pytest.mark.parametrize(("kind", "values", "sentence"), WRONG)
def test_wrong_input_makes_no_job(
    kind: str, values: dict[str, Any], sentence: str, place: Place, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    values = {key: place(value) if key in PATHS else value for key, value in values.items()}
    with pytest.raises(InputError) as told:
        studio.train(kind, folder=tmp_path / "run", **values)
    assert sentence in str(told.value)
    assert not (tmp_path / "run").exists()
    for submit in (jobs.submit, lambda *job: _page(*job)):
        with pytest.raises(InputError) as again:
            submit(KINDS[kind], values)
        assert sentence in str(again.value)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    folder = str(tmp_path / "run")
    for more in ([], ["--detach"], ["--folder", folder], ["--estimate"]):
        assert command(["train", kind, str(file), *more]) == 2
        assert sentence in capsys.readouterr().err
    assert jobs.list() == []
    assert not (tmp_path / "run").exists()


def _page(kind: str, values: dict[str, Any]) -> None:
    """Submit as the page of a kind does, from a filled form."""
    module: Any = {"train-image": train, "train-language": language, "distill": distill}[kind]
    shown = {name: schema_form.show(item, item.default) for name, item in module.KNOWN.items()}
    shown |= {name: schema_form.show(module.KNOWN[name], value) for name, value in values.items()}
    if module is train:
        train._begin([], *(shown[name] for name in train.NAMES))
    elif module is distill:
        prompts = Path(shown["prompts"])
        shown["prompts"] = prompts.read_text() if prompts.is_file() else ""
        if not shown["prompts"].strip():
            jobs.submit(kind, values)  # the page's own sentence on prompts is another one
        distill._begin(*([*values["styles"]] if name == "styles" and "styles" in values else shown[name]
                         for name in distill.NAMES))  # fmt: skip
    else:
        names = [name for name in language.NAMES if name != "base"]
        jobs.submit(kind, language.config_of(shown["data"], shown["base"], [shown[name] for name in names]))


BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "LTX-2": ("ltx2", {}, "LoRAs of LTX-2 are not trained here"),
    "A14B": ("wan", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has 2 denoisers"),
    "edit": ("qwen", {"_class_name": "QwenImageEditPipeline"}, "of Qwen-Image edits pictures"),
    "edit plus": ("qwen", {"_class_name": "QwenImageEditPlusPipeline"}, "of Qwen-Image edits pictures"),
}


@pytest.mark.parametrize("kind", ["image", "distill"])
@pytest.mark.parametrize("name", BASES)
def test_bases_that_training_does_not_know_make_no_job(name: str, kind: str, place: Place, tmp_path: Path) -> None:
    """From their list of parts alone."""
    family, changes, sentence = BASES[name]
    index = {"_class_name": FAMILIES[family].pipeline, "transformer": ["diffusers", "x"], "transformer_2": [None, None]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | changes))
    values = {"data": place("pictures"), "trigger": "zxq"} if kind == "image" else {"prompts": place("prompts.txt")}
    with pytest.raises(InputError, match=sentence):
        jobs.submit(KINDS[kind], {**values, "base": str(tmp_path / "base")})
    assert jobs.list() == []


def test_looking_does_not_load_torch() -> None:
    program = "import sys; import studio.training.ready; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
