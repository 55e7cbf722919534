"""LoRAM and LoRAPrune as jobs, on Llamas of four layers: files, lineage, resume, and what opens the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters.compression.loram import is_recovered
from adapters.compression.structure import read_pruning
from adapters.errors import Cancelled, InputError
from adapters.formats import read
from adapters.formats.lora import MODEL
from adapters.progress import Progress
from pipelines.language.loading import open_model
from studio import library
from studio.compression import pruning_estimate, recovery
from studio.compression.methods import loram, loraprune
from studio.compression.pruning_schema import LoramConfig, LoraPruneConfig
from studio.conversation import Question, Variant
from studio.conversation.session import Session
from studio.jobs import kinds
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.language import run as train
from tests.language import tiny
from tests.language.conftest import Watcher, settings, write_rows

IDS = torch.arange(6, 30)[None]
COMMON: dict[str, Any] = {
    "device": "cpu", "rank": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "warmup_ratio": 0.0,
    "save_every": 0, "checkpoint_every": 0, "prune": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(home))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return tiny.llama(home / "tiny llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def rows(home: Path) -> Path:
    return write_rows(home / "rows.jsonl", [{"prompt": f"{n}?", "completion": "red blue"} for n in range(10)])


class StopAt:
    """A monitor that asks to stop at a stage's step."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step, self.asked = stage, step, False

    def report(self, progress: Progress) -> None:
        self.asked |= progress.stage == self.stage and progress.step >= self.step

    def cancelled(self) -> bool:
        return self.asked


def check_chat(base: str) -> None:
    """A chat with a base of the library ends well."""
    question = Question(base, (Variant("base"),), (({"role": "user", "content": "a"},),), "cpu", "fp32",
                        {"max_tokens": 2})  # fmt: skip
    assert [event["event"] for event in Session().ask(question)][-1] == "end"


@pytest.mark.parametrize("schema", [LoramConfig, LoraPruneConfig])
def test_every_inherited_field_keeps_its_meaning(schema: type[TrainLanguageConfig]) -> None:
    """``keep_last`` is the number of saved adapters, as in every training; layers that stay whole have a name of
    their own."""
    mine, parent = schema.model_fields["keep_last"], TrainLanguageConfig.model_fields["keep_last"]
    assert (mine.default, mine.description, mine.metadata) == (parent.default, parent.description, parent.metadata)


# ------------------------------------------------------------------------------------------------ LoRAM


def asked_loram(base: Path, rows: Path, **changes: Any) -> LoramConfig:
    values = {"base": str(base), "data": str(rows), "name": "facts", "steps": 4, "whole_first": 1, "whole_last": 1,
              "importance_batches": 2, "validation_split": 0.2}  # fmt: skip
    return LoramConfig.parse(COMMON | values | changes)


@pytest.fixture(scope="module")
def recovered(base: Path, rows: Path, home: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_STUDIO_HOME", str(home))
        config = asked_loram(base, rows, align_data=str(rows), align_steps=6, align_rate=3e-3, keep_pruned=True)
        folder = home / "loram"
        watcher = Watcher()
        result = loram.adopted(config, loram.run(config, folder, watcher))
        return {**result, "align_losses": [r.loss for r in watcher.seen if r.stage == "aligning"]}


def test_the_recovered_adapter_is_an_ordinary_lora_of_the_whole_base(
    base: Path, recovered: dict[str, Any], home: Path
) -> None:
    place = library.resolve_adapter("facts")
    pruning = read_pruning(Path(recovered["pruned"]))
    assert pruning is not None
    assert pruning.counts() == [(2, 64), (1, 32), (1, 32), (2, 64)]
    assert (pruning.aligned, pruning.method) == (True, "loram taylor")
    layers = read(place).parts[MODEL]
    assert is_recovered(layers, pruning)
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny llama"
    before = {name: parameter.clone() for name, parameter in whole.named_parameters()}
    merged: Any = PeftModel.from_pretrained(whole, place).merge_and_unload()
    for name, layer in layers.items():
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), before[f"{name}.weight"] + layer.delta())
    small = read(Path(recovered["small_adapter"])).parts[MODEL]
    assert all(float(layer.B.abs().sum()) > 0 for layer in small.values())
    assert (home / "loram" / "kept.png").is_file()
    card = (place / "README.md").read_text()
    assert "tiny llama" in card
    assert "pruned" not in card


def test_alignment_lowers_the_loss_of_its_rows(recovered: dict[str, Any]) -> None:
    losses = recovered["align_losses"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05


def test_losses_of_all_four_are_reported(base: Path, rows: Path, recovered: dict[str, Any]) -> None:
    losses = recovered["losses"]
    assert set(losses) == {"whole", "recovered", "pruned", "pruned_adapter"}
    # the training measured the pruned base with its adapter itself
    assert losses["pruned_adapter"] == pytest.approx(recovered["validation"][-1]["validation_loss"], rel=1e-4)
    assert recovered["ratios"]["small"] < recovered["ratios"]["whole"]


def test_the_pruned_base_is_in_the_library_and_its_adapters_are_recovered(
    base: Path, rows: Path, recovered: dict[str, Any], tmp_path: Path
) -> None:
    record = library.find("facts-pruned", "base")
    assert record.problem == ""
    assert record.preview is not None
    assert "of its parameters" in record.notes["description"]
    small = open_model(record.path).model
    assert small.model.layers[1].mlp.up_proj.out_features == 32
    check_chat("facts-pruned")
    again = train(settings(record.path, rows, steps=2, name="other"), tmp_path / "run", Watcher())
    pruning = read_pruning(record.path)
    assert pruning is not None
    place = recovery.recover(Path(again["adapter"]), pruning, tmp_path / "other", str(base))
    assert is_recovered(read(place).parts[MODEL], pruning)
    foreign = train(settings(base, rows, steps=2, name="whole"), tmp_path / "whole", Watcher())
    with pytest.raises(InputError, match="the whole model"):
        recovery.recover(Path(foreign["adapter"]), pruning, tmp_path / "x", str(base))
    different = loram.prune(asked_loram(base, rows, importance="random"), tmp_path / "pruned", Watcher())
    with pytest.raises(InputError, match="another pruned base"):
        recovery.recover(Path(again["adapter"]), different, tmp_path / "x", str(base))


def test_the_estimate_of_loram_is_what_comes_out(base: Path, rows: Path, recovered: dict[str, Any]) -> None:
    config = asked_loram(base, rows, align_data=str(rows), align_steps=6)
    found = pruning_estimate.of_loram(config)
    pruning = read_pruning(Path(recovered["pruned"]))
    assert pruning is not None
    assert found.pruning.counts() == pruning.counts()
    assert found.ratios.small == recovered["ratios"]["small"]
    assert set(found.memory) == {"cutting", "importance", "alignment", "training"}
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    weights = sum(p.numel() * p.element_size() for p in whole.parameters())
    assert found.memory["importance"] > weights
    assert found.memory["alignment"] > 16 * found.ratios.small
    assert [len(one.values) for one in found.layers] == [4, 4]
    assert "Hold" not in found.advice
    silent = pruning_estimate.of_loram(asked_loram(base, rows, validation_split=0.0, importance="magnitude"))
    assert "validation_split" in silent.advice
    assert set(silent.memory) == {"cutting", "training"}


@pytest.mark.parametrize(("stage", "step"), [pytest.param("aligning", 2, marks=pytest.mark.slow), ("training", 2)])
def test_a_stopped_loram_goes_on_to_the_same_adapter(
    base: Path, rows: Path, home: Path, recovered: dict[str, Any], tmp_path: Path, stage: str, step: int
) -> None:
    config = asked_loram(base, rows, align_data=str(rows), align_steps=6, align_rate=3e-3)
    with pytest.raises(Cancelled):
        loram.run(config, tmp_path, StopAt(stage, step))
    result = loram.run(config, tmp_path, Watcher(), resume=True)
    wanted = read(Path(recovered["adapter"])).parts[MODEL]
    found = read(Path(result["adapter"])).parts[MODEL]
    assert all(torch.equal(found[name].B, layer.B) for name, layer in wanted.items())


def test_qloram_trains_on_a_pruned_base_in_few_bits(base: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = loram.run(asked_loram(base, rows, quantization="4bit", steps=2), tmp_path, Watcher())
    layers = read(Path(result["adapter"])).parts[MODEL]
    assert layers["model.layers.1.mlp.up_proj"].B.shape == (64, 2)
    assert result["ratios"]["nominal"] == pytest.approx(4 * result["ratios"]["whole"] / result["ratios"]["small"])


@pytest.mark.parametrize(
    ("pattern", "importance", "share"), [("4:8", "wanda", 0.5), ("unstructured", "magnitude", 0.65)]
)
def test_zeros_in_place_need_no_recovery(
    base: Path, rows: Path, tmp_path: Path, pattern: str, importance: str, share: float
) -> None:
    config = asked_loram(base, rows, pattern=pattern, importance=importance, prune=share, steps=2, align_steps=2,
                         align_data=str(rows), align_rate=3e-3)  # fmt: skip
    result = loram.run(config, tmp_path, Watcher())
    pruning = read_pruning(Path(result["pruned"]))
    assert pruning is not None
    assert pruning.counts() == [(2, 64)] * 4
    assert pruning.zeros == pytest.approx(share, abs=0.02)
    assert pruning.method == f"loram {pattern} {importance}"
    whole, zeroed = open_model(base).model, open_model(tmp_path / "pruned").model
    aligned = open_model(tmp_path / "aligned").model
    W, Z, L = (m.model.layers[1].mlp.down_proj.weight for m in (whole, zeroed, aligned))
    assert float((Z == 0).double().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(Z[Z != 0], W[Z != 0])
    assert torch.equal(L == 0, Z == 0)
    assert not torch.equal(L, Z)
    assert torch.equal(zeroed.model.layers[0].mlp.down_proj.weight, whole.model.layers[0].mlp.down_proj.weight)
    small, back = (read(Path(result[key])).parts[MODEL] for key in ("small_adapter", "adapter"))
    assert all(torch.equal(small[name].B, layer.B) and torch.equal(small[name].A, layer.A)
               for name, layer in back.items())  # fmt: skip
    other = loram.prune(config.model_copy(update={"importance": "random"}), tmp_path / "other", Watcher())
    with pytest.raises(InputError, match="another pruned base"):
        recovery.recover(Path(result["small_adapter"]), other, tmp_path / "x", str(base))
    assert "no memory" in pruning_estimate.of_loram(config).advice


def test_bases_that_cannot_be_pruned_are_refused_before_the_training(
    base: Path, rows: Path, home: Path, tmp_path: Path
) -> None:
    packed = home / "packed"
    packed.mkdir(exist_ok=True)
    for file in base.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    plain = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**plain, "quantization_config": {"load_in_4bit": True}}))
    for kind, asked in (("compress-loram", asked_loram), ("compress-loraprune", asked_loraprune)):
        for place, changes, said in ((packed, {}, "quantised model cannot be pruned"),
                                     (base, {"whole_first": 4}, "leaves none to prune"),
                                     (tiny.gpt2(home / "gpt2"), {"chat_template": "chatml"}, "gpt2")):  # fmt: skip
            with pytest.raises(InputError, match=said):
                kinds.find(kind).check(asked(place, rows, **changes))
    for changes, said in (({"importance": "wanda"}, "wanda judges"), ({"pattern": "4:8"}, "taylor judges"),
                          ({"pattern": "2:4", "importance": "wanda", "prune": 0.6}, "set prune to 0.5")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            asked_loram(base, rows, **changes)


# ------------------------------------------------------------------------------------------------ LoRAPrune


def asked_loraprune(base: Path, rows: Path, **changes: Any) -> LoraPruneConfig:
    values = {"base": str(base), "data": str(rows), "name": "small", "steps": 10, "prune_every": 2}
    return LoraPruneConfig.parse(COMMON | values | changes)


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "one query head each"])
def pruned(request: pytest.FixtureRequest, home: Path, rows: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_STUDIO_HOME", str(home))
        own = tiny.llama(home / f"own-{request.param}", num_hidden_layers=4, num_key_value_heads=request.param)
        config = asked_loraprune(own, rows, name=f"small-{request.param}", validation_split=0.2)
        folder = home / f"loraprune-{request.param}"
        result = loraprune.adopted(config, loraprune.run(config, folder, Watcher()))
        return {**result, "own": own, "config": config, "folder": folder}


def test_the_small_base_opens_in_stock_transformers_and_computes_what_was_trained(pruned: dict[str, Any]) -> None:
    place = library.resolve_language(pruned["library"])
    small: Any = AutoModelForCausalLM.from_pretrained(place)
    assert small.config.intermediate_size == 32
    assert small.config.num_attention_heads == 2
    assert small.num_parameters() == pruned["ratios"]["small"]
    assert pruned["uniform"]
    found = read_pruning(Path(place))
    assert found is not None
    assert found.base_name == str(pruned["own"])
    # the last measure of the training was with masks, of the model before it was merged and cut
    task = loraprune.language.task_for(pruned["config"])
    task.rows()
    opened = open_model(place)
    samples = task.tokens(opened.tokenizer, opened.longest).held_out
    collate = loram.Collate(opened.tokenizer.pad_token_id)
    loss = loram.measure(opened.model, [collate(samples)], shifted=True)[0]["validation_loss"]
    assert loss == pytest.approx(pruned["validation"][-1]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("pruned", [2], indirect=True)
def test_the_estimate_of_loraprune_is_what_comes_out(pruned: dict[str, Any]) -> None:
    found = pruning_estimate.of_loraprune(pruned["config"])
    assert found.ratios.small == pruned["ratios"]["small"]
    assert found.files == pytest.approx((Path(pruned["base"]) / "model.safetensors").stat().st_size, rel=0.1)
    assert found.base_files == (pruned["own"] / "model.safetensors").stat().st_size
    assert found.as_json()["counts"] == [(1, 32)] * 4
    with pytest.raises(InputError, match="pruned already"):
        pruning_estimate.of_loraprune(pruned["config"].model_copy(update={"base": pruned["base"]}))


@pytest.mark.parametrize("pruned", [2], indirect=True)
def test_chat_and_training_use_the_small_base(pruned: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    check_chat(pruned["library"])
    place = library.resolve_language(pruned["library"])
    made = train(settings(Path(place), rows, steps=2), tmp_path, Watcher())
    small: Any = AutoModelForCausalLM.from_pretrained(place)
    PeftModel.from_pretrained(small, made["adapter"])(IDS)
    record = library.find(pruned["library"], "base")
    assert record.preview is not None
    assert not (pruned["folder"] / pruned["library"] / "adapter_config.json").exists()


@pytest.mark.parametrize("pruned", [2], indirect=True)
def test_a_stopped_loraprune_goes_on_to_the_same_model(pruned: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        loraprune.run(pruned["config"], tmp_path, StopAt("training", 5))
    result = loraprune.run(pruned["config"], tmp_path, Watcher(), resume=True)
    assert result["history"] == pruned["history"]
    found: Any = AutoModelForCausalLM.from_pretrained(result["base"]).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(pruned["base"]).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_layers_that_stay_whole_open_here(base: Path, rows: Path, tmp_path: Path) -> None:
    result = loraprune.run(asked_loraprune(base, rows, whole_first=1, whole_last=1, steps=4), tmp_path, Watcher())
    assert not result["uniform"]
    assert open_model(result["base"]).model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("pruned", [2], indirect=True)
def test_refusals(base: Path, rows: Path, pruned: dict[str, Any], tmp_path: Path) -> None:
    for changes, text in (
        ({"task": "masked"}, "task"), ({"use_dora": True}, "DoRA"), ({"l4q_bits": 4}, "l4q_bits"),
        ({"prune": 1.0}, "less than 1"),
        ({"init": "pissa"}, "init"), ({"prune_warmup": 0.5, "prune_cooldown": 0.5}, "prune_warmup"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            asked_loraprune(base, rows, **changes)
    with pytest.raises(InputError, match="pruned already"):
        loraprune.run(asked_loraprune(Path(pruned["base"]), rows, steps=1), tmp_path, Watcher())
    with pytest.raises(InputError, match="leaves none"):
        loram.run(asked_loram(base, rows, whole_first=4, whole_last=2), tmp_path, Watcher())
    with pytest.raises(InputError, match="gpt2"):
        loram.run(asked_loram(tiny.gpt2(tmp_path / "gpt2"), rows, chat_template="chatml"), tmp_path, Watcher())
