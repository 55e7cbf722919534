"""The composition job on a tiny random model: the same bits again, from a worker, a command or a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from adapters import files
from adapters.errors import Cancelled, InputError
from adapters.progress import Progress, Silent
from pipelines.diffusion import MultiLoRAPipeline, pipeline
from studio import jobs
from studio.composition import job as compose
from studio.composition import pipeline_cache, recipe_png, recipes
from studio.composition.schema import ComposeConfig
from tests import tiny
from tests.studio.files import diffusers_lora
from tests.studio.waiting import ended

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion and two adapters for it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.saved("sd", folder)
    pipe = tiny.sd()
    for seed, name in ((1, "cat"), (2, "dog")):
        tiny.lora_file(pipe, folder, seed=seed).rename(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def config(model) -> ComposeConfig:
    return ComposeConfig(
        base=str(model / "tiny-sd-0"), prompt="a cat", steps=3, method="composite", device="cpu",
        adapters=[{"path": str(model / "cat.safetensors"), "weight": 0.8},
                  {"path": str(model / "dog.safetensors"), "schedule": [(0, 1), (0.5, 1), (0.5, 0), (1, 0)]}],
    )  # fmt: skip


class Listener(Silent):
    def __init__(self) -> None:
        self.reports: list[Progress] = []

    def report(self, progress: Progress) -> None:
        self.reports.append(progress)


def test_pictures_and_recipe_are_written(config, tmp_path):
    listener = Listener()
    result = compose.run(config.model_copy(update={"images": 2, "seed": 4}), tmp_path, listener)
    assert [Path(path).name for path in result["images"]] == ["picture-4.png", "picture-5.png"]
    assert result["adapters"] == ["cat", "dog"]
    assert recipe_png.read_recipe(result["recipe"])["config"]["images"] == 2
    steps = [report.step for report in listener.reports if report.stage == "sampling"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert any(report.preview is not None for report in listener.reports)


def test_a_picture_of_a_series_is_repeated_to_the_bit(config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = compose.run(config.model_copy(update={"images": 2}), tmp_path / "a", Silent())
    pipeline_cache.release()
    recipe = recipe_png.read_recipe(first["images"][1])
    again = compose.run(recipes.replay(recipe), tmp_path / "b", Silent())
    assert Path(again["images"][0]).read_bytes() == Path(first["images"][1]).read_bytes()


def test_a_recipe_says_whether_adapters_were_folded(config, tmp_path, monkeypatch):
    """Recipes of versions that did not fold are drawn as they were; so are those whose weights had no room."""
    folded: list[bool] = []
    plain = MultiLoRAPipeline._everywhere

    def seen(self, plan, *rest):
        folded.append(bool(plan.folds.settings))
        return plain(self, plan, *rest)

    monkeypatch.setattr(MultiLoRAPipeline, "_everywhere", seen)
    config = config.model_copy(update={"method": "merge", "steps": 8})

    def made(config: ComposeConfig, name: str) -> Path:
        (tmp_path / name).mkdir()
        return Path(compose.run(config, tmp_path / name, Silent())["images"][0])

    inside, beside = made(config, "inside"), made(config.model_copy(update={"fold": False}), "beside")
    recipe = recipe_png.read_recipe(beside)
    del recipe["config"]["fold"]
    old = recipe_png.save_png(Image.open(beside), tmp_path / "old.png", recipe)
    again = made(recipes.replay(recipe_png.read_recipe(old)), "again")
    assert again.read_bytes() == beside.read_bytes()
    assert made(recipes.replay(recipe_png.read_recipe(inside)), "twice").read_bytes() == inside.read_bytes()
    assert folded == [True, False, False, True]
    monkeypatch.setattr(pipeline, "free", lambda device: 0)
    narrow = made(config, "narrow")
    assert not recipe_png.read_recipe(narrow)["config"]["fold"]
    assert not recipe_png.read_recipe(tmp_path / "narrow" / "recipe.json")["config"]["fold"]
    assert Image.open(narrow).tobytes() == Image.open(beside).tobytes()


def test_loading_and_recipe_hash_a_file_once(config, tmp_path, monkeypatch):
    hashed: list[str] = []
    plain = files.sha256

    def counted(*paths: Path) -> str:
        hashed.extend(path.name for path in paths)
        return plain(*paths)

    monkeypatch.setattr(files, "sha256", counted)
    result = compose.run(config, tmp_path, Silent())
    assert sorted(hashed).count("cat.safetensors") == 1
    assert recipe_png.read_recipe(result["recipe"])["adapters"][0]["sha256"] == plain(Path(config.adapters[0].path))


def test_the_kept_pipeline_changes_nothing(config, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    fresh = compose.run(config, tmp_path / "a", Silent())
    kept = pipeline_cache._kept[1]
    other = config.model_copy(update={"method": "switch", "adapters": config.adapters[:1]})
    compose.run(other, tmp_path / "b", Silent())
    later = compose.run(config, tmp_path / "c", Silent())
    assert pipeline_cache._kept[1] is kept
    assert kept.adapters == {}
    assert Path(later["images"][0]).read_bytes() == Path(fresh["images"][0]).read_bytes()


def test_the_worker_makes_the_same_picture(config, tmp_path):
    here = compose.run(config, tmp_path, Silent())
    ids = [jobs.submit("compose", config) for _ in range(2)]
    jobs.ensure_worker()
    found = ended(*ids)
    assert [job.status for job in found] == ["done", "done"], [job.error for job in found]
    for job in found:
        assert Path(job.result["images"][0]).read_bytes() == Path(here["images"][0]).read_bytes()


def test_the_next_job_finds_the_pipeline_loaded(config, monkeypatch):
    opened, load = [], pipeline_cache._load
    monkeypatch.setattr(pipeline_cache, "_load", lambda choice: opened.append(choice.base) or load(choice))
    pipeline_cache.release()
    for seed in (0, 1):
        jobs.run_here("compose", config.model_copy(update={"seed": seed}), Silent())
    assert opened == [config.base]


def test_training_frees_the_kept_pipeline(config):
    jobs.run_here("compose", config, Silent())
    assert pipeline_cache._kept is not None
    jobs.run_here("count", {"to": 1}, Silent())
    assert pipeline_cache._kept is None


class _Stop(Listener):
    def cancelled(self) -> bool:
        return any(report.stage == "sampling" for report in self.reports)


def test_stopping_keeps_the_pipeline_and_finished_pictures(config, tmp_path):
    with pytest.raises(Cancelled):
        compose.run(config.model_copy(update={"images": 3}), tmp_path, _Stop())
    assert pipeline_cache._kept[1].adapters == {}


def test_names_and_triggers_are_settled(tmp_path):
    path = diffusers_lora(tmp_path / "cat.safetensors", **{"modelspec.trigger_phrase": "zxq"})
    uses = [{"path": str(path)}, {"path": str(path), "triggers": ["b"]}, {"name": "x", "path": str(path)}]
    config = ComposeConfig(adapters=uses)
    settled = compose.settled(config)
    assert [use.name for use in settled.adapters] == ["cat", "cat-2", "x"]
    assert settled.adapters[0].triggers == ["zxq"]


def test_plan_makes_nothing(config):
    planned = compose.plan(config)
    assert planned.to_dict()["steps"] == 3
    assert jobs.list() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"method": "swich"}, r"did you mean 'switch'\?"), ({"base": "nothing"}, "no base model 'nothing'"),
     ({"adapters": [{"path": "nobody"}]}, "no adapter 'nobody'")],
)  # fmt: skip
def test_wrong_choices_are_one_sentence(config, change, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        compose.run(ComposeConfig.parse({**config.model_dump(mode="json"), **change}), tmp_path, Silent())
    assert pipeline_cache._kept is None, "refused before the base is loaded"


def test_an_adapter_of_another_family_is_refused(config, tmp_path):
    path = diffusers_lora(tmp_path / "xl.safetensors", width=2048)
    change = config.model_copy(update={"adapters": [config.adapters[0].model_copy(update={"path": str(path)})]})
    with pytest.raises(InputError):
        compose.run(change, tmp_path, Silent())
