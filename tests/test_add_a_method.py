"""``docs/add-a-method.md``: the page's very code, installed as a package, is a training and a composition method."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with the page's module and what an installer writes beside it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_methods.py").write_text(_block("python"))
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    ((group, points),) = tomllib.loads(_block("toml"))["project"]["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    return folder


def _run(installed: Path, tmp_path: Path, code: str, *arguments: str) -> str:
    paths = os.pathsep.join([str(installed), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "ADAPTER_STUDIO_HOME": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True,
                          cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) < 60


def test_it_is_listed_and_has_flags(installed: Path, tmp_path: Path) -> None:
    main = "from studio.cli import main; main()"
    listed = _run(installed, tmp_path, main, "methods", "--json")
    assert '"steepest"' in listed
    assert '"backwards"' in listed
    flags = _run(installed, tmp_path, main, "train", "image", "--help")
    assert "--steepest-size" in flags
    assert "length of each row of A" in flags


def test_it_is_in_yaml_form_and_table_without_torch(installed: Path, tmp_path: Path) -> None:
    code = """
import sys, yaml
from adapters import catalogue
from studio.training.schemas import combinations
from studio.training.schemas.language import TrainLanguageConfig
from ui.components import method_help, schema_form
assert "torch" not in sys.modules and "my_methods" not in sys.modules

text = yaml.safe_load("{base: b, data: d, init: steepest, steepest_size: 2, rank: 1}")
config = TrainLanguageConfig.model_validate(text)
assert config.steepest_size == 2.0 and TrainLanguageConfig.model_fields["steepest_size"].default == 1.0
try:
    TrainLanguageConfig.model_validate({**text, "freeze_a": True})
except ValueError as error:
    assert "steepest with freeze_a needs a rank of at least 2" in str(error)
else:
    raise AssertionError("not refused")
for wrong in ({"steepest_size": 0}, {"init": "steepes"}):
    try:
        TrainLanguageConfig.model_validate({**text, **wrong})
    except ValueError:
        continue
    raise AssertionError(wrong)

known = schema_form.fields(TrainLanguageConfig)
assert ("Steepest directions", "steepest") in method_help.choices(known["init"])
assert not method_help.widget(known["steepest_size"], "language").visible
assert method_help.needed("steepest_size", "steepest") and method_help.needed("init_batches", "steepest")
assert not method_help.needed("steepest_size", "lora_ga")
assert "the loss changes fastest" in method_help.explain({"init": "steepest"})
assert "| `steepest` Steepest directions | initialise |" in catalogue.markdown_table(catalogue.methods())
assert "| `backwards` Turns, backwards | compose |" in catalogue.markdown_table(catalogue.methods())
"""
    _run(installed, tmp_path, code)


@pytest.mark.journey
def test_it_trains(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
from adapters.layers.variant import adapted, pair
from benchmarks import dialects
from benchmarks.plain_loop import Recipe, prepare, train

data = lambda number: dialects.batch(dialects.NEW, 8, 0, number)
recipe = Recipe(init="steepest", steepest_size=0.5, init_batches=2, steps=4, rank=2)
for layer in adapted(prepare(dialects.model(), recipe, data, dialects.TARGETS).model).values():
    A, B = pair(layer)
    torch.testing.assert_close(A @ A.T, 0.25 * torch.eye(2))
    assert not B.any()
run = train(dialects.model(), recipe, data, dialects.TARGETS)
assert len(run.losses) == 4 and all(map(torch.isfinite, map(torch.tensor, run.losses)))
assert any(pair(layer)[1].any() for layer in adapted(run.model).values())
"""
    _run(installed, tmp_path, code)


@pytest.mark.journey
def test_it_composes(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import torch
from pipelines.diffusion import MultiLoRAPipeline
from tests import tiny

folder = Path(sys.argv[1])
def latents(method, *names):
    pipe = MultiLoRAPipeline(tiny.sd())
    for name in names:
        pipe.load_lora(tiny.lora_file(tiny.sd(), folder, seed=ord(name), text_targets=()), name)
    return pipe.compose(method)("a cat", steps=2, width=32, height=32, output_type="latent").images

backwards = latents("backwards", "a", "b")
torch.testing.assert_close(backwards, latents("switch", "b", "a"))
assert not torch.allclose(backwards, latents("switch", "a", "b"))
"""
    _run(installed, tmp_path, code, str(tmp_path))
