"""From a training's snapshots to generated adapters, for pictures and for language; bases are told by their weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.errors import FamilyError, InputError
from adapters.formats import LoraFile, LoraLayer, read
from adapters.formats.lora import RECIPE_ENTRY
from adapters.generation.flat_lora import LoraCodec
from adapters.progress import Silent
from studio import library
from studio.generation import job
from studio.generation.schema import GenerateSampleConfig, GenerateTrainConfig
from studio.generation.vectors import Base
from studio.training.schemas.image import TrainImageConfig
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.image import run as train_image
from studio.training.tasks.language import run as train_language
from tests import tiny
from tests.language import tiny as language
from tests.training import bed
from tests.training.conftest import settings

SMALL = {"steps": 60, "hidden": 8, "latent": 4, "learning_rate": 5e-3}


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def test_an_image_training_keeps_snapshots_that_a_generator_learns_from(tmp_path):
    base, pictures = tiny.saved("sd", tmp_path / "bases"), bed.crosses(tmp_path / "pictures")
    asked = {"snapshots": {}, "examples": {}, "base": str(base), **SMALL}
    for seed, task in enumerate(("cross", "star")):
        config = settings(base, pictures, steps=4, snapshots=3, name=task, rank=1, targets="attention", seed=seed,
                          export=["diffusers", "kohya", "peft"], trigger=task, mode="concept")  # fmt: skip
        result = train_image(config, tmp_path / task)
        names = [file.name for file in sorted(Path(result["snapshots"]).iterdir())]
        assert names == [f"{task}-{step:06d}.safetensors" for step in (2, 3, 4)]
        last = LoraCodec.of(read(Path(result["adapter"])))
        assert torch.equal(last.flatten(read(Path(result["snapshots"]) / names[-1])),
                           last.flatten(read(Path(result["adapter"]))))  # fmt: skip
        (tmp_path / f"{task}.txt").write_text(f"a {task}\na large {task}\n")
        asked["snapshots"][task], asked["examples"][task] = result["snapshots"], str(tmp_path / f"{task}.txt")
    made = job.train(GenerateTrainConfig.parse(asked), tmp_path / "generator", Silent())
    assert made["triggers"] == {"cross": ["cross"], "star": ["star"]}
    assert "different seeds (cross 0, star 1)" in made["remarks"][0]
    wanted = GenerateSampleConfig.parse({"generator": made["generator"], "task": "star", "base": str(base)})
    (name,) = job.sample(wanted, tmp_path / "made", Silent())["library"]
    record = next(one for one in library.adapters() if one.name == name)
    assert record.family == "sd"
    assert list(record.triggers) == ["star"]
    recipe = read(record.path).recipe()
    assert recipe["base"]["digest"] == Base.open(str(base)).digest
    assert recipe["config"]["seed"] == 0
    other = tiny.saved("sd", tmp_path / "others", seed=1)
    with pytest.raises(FamilyError, match="other weights"):
        job.sample(wanted.model_copy(update={"base": str(other)}), tmp_path / "made", Silent())


def test_a_fresh_language_training_drops_old_snapshots_and_a_generator_takes_the_new_ones(tmp_path):
    base, rows = language.llama(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the sum of {i} and {i} is {2 * i}"}) + "\n" for i in range(8)))
    (tmp_path / "run" / "snapshots" / "old-000001").mkdir(parents=True)
    config = TrainLanguageConfig.parse({
        "base": str(base), "data": str(rows), "task": "causal", "rank": 1, "steps": 3, "snapshots": 2, "batch_size": 2,
        "device": "cpu", "save_every": 0, "checkpoint_every": 0, "name": "sums",
    })  # fmt: skip
    result = train_language(config, tmp_path / "run")
    assert sorted(one.name for one in Path(result["snapshots"]).iterdir()) == ["sums-000002", "sums-000003"]
    (tmp_path / "sums.txt").write_text("1 and 2\n3 and 4\n")
    asked = GenerateTrainConfig.parse({
        "snapshots": {"sums": result["snapshots"]}, "examples": {"sums": str(tmp_path / "sums.txt")}, "base": str(base),
        "single_task": True, "shots": 1, **SMALL,
    })  # fmt: skip
    made = job.train(asked, tmp_path / "generator", Silent())
    assert made["remarks"] == []
    assert made["vectors"]["shots"] == 1
    by_examples = {"generator": made["generator"], "examples": str(tmp_path / "sums.txt")}
    told = job.sample(GenerateSampleConfig.parse({**by_examples, "base": str(base)}), tmp_path / "made", Silent())
    assert told["library"] == ["generated"]
    other = language.llama(tmp_path / "elsewhere" / "base", seed=1)  # of the same name
    with pytest.raises(InputError, match="whose weights are not those"):
        job.sample(GenerateSampleConfig.parse({**by_examples, "base": str(other)}), tmp_path / "made", Silent())


def test_snapshots_of_what_no_generator_learns_are_refused():
    for schema, values in (
        (TrainImageConfig, {"base": "b", "data": "d", "mode": "captioned", "use_dora": True}),
        (TrainLanguageConfig, {"base": "b", "data": "d", "use_dora": True}),
        (TrainLanguageConfig, {"base": "b", "data": "d", "method": "mixlora"}),
    ):
        with pytest.raises(InputError, match="snapshots are for a generator"):
            schema.parse({**values, "snapshots": 5})


def file(name: str = "", digest: str = "") -> LoraFile:
    recipe = {"base": {"name": name, "digest": digest, "more": [1]}}
    layer = LoraLayer(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    return LoraFile({"model": {"q": layer}}, metadata={RECIPE_ENTRY: json.dumps(recipe)} if digest else {},
                    config={"base_model_name_or_path": name})  # fmt: skip


def test_bases_are_told_apart_by_their_weights_where_they_are_known():
    codec = LoraCodec.of(file("mine", "aaa"))
    assert codec.origin == {"name": "mine", "digest": "aaa"}
    assert LoraCodec.from_dict(codec.to_dict()) == codec
    codec.check(file("renamed", "aaa"))
    codec.check(file("mine"))
    for other, message in ((file("mine", "bbb"), "other weights"), (file("yours"), "for the base 'yours'")):
        with pytest.raises(FamilyError, match=message):
            codec.check(other)
    broken = replace(file(), metadata={RECIPE_ENTRY: "[" * 100_000})
    assert broken.recipe() == LoraCodec.of(broken).origin == {}
