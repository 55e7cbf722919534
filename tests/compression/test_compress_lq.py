"""``studio compress lq`` on tiny models: the base in the library, what opens it, cancel and resume, and refusals."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapters.compression.normal_float import NormalFloatLinear
from adapters.compression.storage import plain_weight, storage, stored_bytes
from adapters.errors import Cancelled, FamilyError, InputError
from adapters.progress import Progress, Silent
from pipelines.language import compressed
from pipelines.language.adapters import AdaptedModel
from pipelines.language.loading import open_model
from studio import library
from studio.cli import app as cli
from studio.compression import ready
from studio.compression.base import Base, squares
from studio.compression.estimate import estimated
from studio.compression.methods import lq
from studio.compression.schema import CompressLqConfig
from studio.conversation import Question, Variant
from studio.conversation.session import Session
from studio.training.tasks.language import run as train
from tests.language import tiny
from tests.language.conftest import settings, write_rows

IDS = torch.arange(6, 30)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTER_STUDIO_HOME", str(home))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return tiny.llama(home / "models" / "tiny llama")


@pytest.fixture(scope="module")
def chats(home: Path) -> Path:
    return write_rows(home / "rows.jsonl", [{"prompt": f"{n}?", "completion": "red blue"} for n in range(8)])


def asked(base: Path, **changes: Any) -> CompressLqConfig:
    return CompressLqConfig.parse({"base": str(base), "bits": 3.0, "rank": 4, "steps": 4, "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def made(base: Path, chats: Path, home: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTER_STUDIO_HOME", str(home))
        folder = home / "job"
        folder.mkdir()
        return lq.run(asked(base, data=str(chats), samples=6, name="small"), folder, Silent())


def test_the_result_is_a_base_with_lineage(base: Path, made: dict[str, Any]) -> None:
    record = library.find("small", "base")
    assert (record.family, record.problem) == ("language", "")
    assert record.notes["compressed"] == f"lq-lora, {made['bits']:.2f} bits"
    assert record.notes["base_model"] == "tiny llama"
    assert 2.9 <= made["bits"] <= 3.0
    assert made["error"] < made["plain"]
    assert made["solver"] == "milp"
    manifest = compressed.read_manifest(record.path)
    assert manifest is not None
    assert len(manifest.matrices) == 14
    tensors = {k: v for file in compressed.packed_files(record.path) for k, v in load_file(file).items()}
    packed = sum(t.nbytes for k, t in tensors.items() if k.rpartition(".")[0] in manifest.matrices)
    count = sum(out * inputs for out, inputs in (one.shape for one in manifest.matrices.values()))
    assert made["bits"] == pytest.approx(8 * packed / count, abs=1e-3)
    whole = load_file(base / "model.safetensors")
    assert all(torch.equal(tensors[name], whole[name]) for name in whole if name in tensors)
    with pytest.raises(OSError, match=r"model\.safetensors"):  # not opened half by programs that do not know it
        __import__("transformers").AutoModelForCausalLM.from_pretrained(record.path)


def test_the_opened_model_computes_q_plus_the_low_rank_part(base: Path, made: dict[str, Any]) -> None:
    opened, whole = open_model(made["path"]).model, open_model(base).model
    layer = opened.model.layers[0].self_attn.q_proj
    assert isinstance(layer, NormalFloatLinear)
    assert layer.low_rank is not None
    assert storage(opened.lm_head) == ""
    for name, module in opened.named_modules():
        if storage(module):
            whole.get_submodule(name).weight.data = plain_weight(module)
    with torch.no_grad():
        expected, found = whole(IDS).logits, opened(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert stored_bytes(opened) < stored_bytes(whole)
    manifest = compressed.read_manifest(made["path"])
    config = whole.config
    bare, _ = compressed.open_compressed(
        Path(made["path"]), manifest, __import__("transformers").AutoModelForCausalLM, config, torch.float32, False
    )
    beside = PeftModel.from_pretrained(bare, str(Path(made["path"]) / compressed.LOW_RANK)).eval()
    with torch.no_grad():  # the tied LoRA by stock PEFT, on Q alone
        assert torch.allclose(beside(IDS).logits, expected, atol=1e-4)


def test_chat_and_training_open_it_directly(base: Path, made: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    question = Question("small", (Variant("base"),), (({"role": "user", "content": "a"},),), "cpu", "fp32",
                        {"max_tokens": 2})  # fmt: skip
    assert [event["event"] for event in Session().ask(question)][-1] == "end"
    before = compressed.digest_of(Path(made["path"]))
    config = settings(Path("small"), chats, init="lq_lora", rank=4, alpha=2.0, steps=3)
    result = train(config, tmp_path, Silent())
    assert compressed.digest_of(Path(made["path"])) == before
    adapted = AdaptedModel(open_model(made["path"]).model)
    adapted.add("learnt", Path(result["adapter"]))
    with torch.no_grad(), adapted.active({}) as model:
        start = model(IDS).logits.clone()
    with torch.no_grad(), adapted.active({"learnt": 1.0}) as model:
        assert float((model(IDS).logits - start).abs().max()) > 1e-4
    whole = AdaptedModel(open_model(base).model)  # the same change on the whole base
    whole.add("learnt", Path(result["adapter"]))
    with pytest.raises(InputError, match="rank 4: set rank to 4"):
        train(settings(Path("small"), chats, init="lq_lora", rank=2), tmp_path / "other", Silent())
    with pytest.raises(InputError, match="studio compress lq"):
        train(settings(base, chats, init="lq_lora"), tmp_path / "third", Silent())


def test_training_at_the_start_is_the_compressed_model(made: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly zero the saved change is nearly zero: the pair starts as the low-rank part."""
    config = settings(Path("small"), chats, init="lq_lora", rank=4, steps=1, learning_rate=1e-12)
    weights = load_file(Path(train(config, tmp_path, Silent())["adapter"]) / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    A, B = weights[f"{key}.lora_A.weight"].float(), weights[f"{key}.lora_B.weight"].float()
    low_rank = open_model(made["path"]).model.model.layers[0].self_attn.q_proj.low_rank
    assert A.shape[0] == 8
    assert torch.allclose(B[:, :4] @ A[:4], low_rank[1].float() @ low_rank[0].float(), atol=1e-3)
    assert float((B @ A).abs().max()) < 1e-3


def test_the_tied_lora_is_refused_elsewhere(base: Path, made: dict[str, Any], tmp_path: Path) -> None:
    tied = Path(made["path"]) / compressed.LOW_RANK
    with pytest.raises(FamilyError, match="low-rank part of a compressed base"):
        AdaptedModel(open_model(base).model).add("x", tied)
    with pytest.raises(InputError, match="has it already"):
        AdaptedModel(open_model(made["path"]).model).add("x", tied)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(made["path"]).rglob("*"):
        if file.is_file():
            (copy / file.relative_to(made["path"])).parent.mkdir(exist_ok=True)
            (copy / file.relative_to(made["path"])).write_bytes(file.read_bytes())
    manifest = json.loads((copy / compressed.FILE).read_text())
    (copy / compressed.FILE).write_text(json.dumps({**manifest, "digest": "0" * 64}))
    with pytest.raises(InputError, match="belongs to other packed weights"):
        open_model(copy)
    (copy / compressed.FILE).write_text("{")
    with pytest.raises(InputError, match=r"compression\.json' is damaged"):
        open_model(copy)
    with pytest.raises(InputError, match="compressed already"):
        open_model(made["path"], quantization="int8")
    with pytest.raises(InputError, match="compressed already: start from the model"):
        ready.base_and_rows(asked(Path(made["path"])))


class Stopping:
    """A monitor that stops after so many reports of a stage."""

    def __init__(self, stage: str, after: int) -> None:
        self.stage, self.after, self.seen = stage, after, list[Progress]()

    def report(self, progress: Progress) -> None:
        self.seen.append(progress)

    def cancelled(self) -> bool:
        return sum(one.stage == self.stage for one in self.seen) >= self.after


def test_a_stopped_job_goes_on_to_the_same_base(base: Path, made: dict[str, Any], chats: Path, tmp_path: Path) -> None:
    config = asked(base, data=str(chats), samples=6, name="again")
    for stage, after in (("looking at rows", 3), ("measuring", 12), ("compressing", 5)):
        with pytest.raises(Cancelled):
            lq.run(config, tmp_path, Stopping(stage, after), resume=True)
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / lq.PARTS_FOLDER).iterdir()}
    assert len(done) == 5
    watching = Stopping("never", 1)
    result = lq.run(config, tmp_path, watching, resume=True)
    assert not any(one.stage == "looking at rows" for one in watching.seen)
    assert compressed.digest_of(Path(result["path"])) == compressed.digest_of(Path(made["path"]))


def test_matrices_are_in_memory_one_at_a_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a base may be larger than memory."""
    seen: list[weakref.ref[torch.Tensor]] = []
    together: list[int] = []
    read = Base.read

    def watched(self: Base, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if name.removesuffix(".weight") in self.matrices:
            seen.append(weakref.ref(tensor))
            together.append(sum(one() is not None for one in seen))
        return tensor

    monkeypatch.setattr(Base, "read", watched)
    lq.run(asked(base, name="streamed"), tmp_path, Silent())
    assert len(together) >= 2 * len(Base.of(str(base)).matrices)  # measured, then decomposed
    assert max(together) <= 2  # the next is read before the last one's name is given away


def test_rows_change_what_is_kept(base: Path, made: dict[str, Any], tmp_path: Path) -> None:
    result = lq.run(asked(base, name="blind"), tmp_path, Silent())
    assert compressed.digest_of(Path(result["path"])) != compressed.digest_of(Path(made["path"]))
    uniform = lq.run(asked(base, uniform="nf4", rank=0, name="plain"), tmp_path / "two", Silent())
    assert uniform["bits"] > 4.126  # these matrices are smaller than a super-block: filled up, and counted
    opened = open_model(uniform["path"]).model
    assert opened.model.layers[0].mlp.up_proj.low_rank is None
    assert not (Path(uniform["path"]) / compressed.LOW_RANK).exists()


def test_the_estimate_is_close_to_the_files(base: Path, made: dict[str, Any]) -> None:
    found = estimated(asked(base))
    kept = sum(
        file.stat().st_size for file in Path(made["path"]).rglob("*.safetensors")
    )  # heads of the files are large beside a tiny model
    assert found.bytes == pytest.approx(kept, rel=0.35)
    assert found.base_bytes == (base / "model.safetensors").stat().st_size
    fitting = estimated(asked(base, fit=found.bytes / 1e9))
    assert fitting.bits == pytest.approx(found.bits)
    with pytest.raises(InputError, match=r"1e-05 GB is too little: .*low-rank part of rank 4"):
        estimated(asked(base, fit=1e-5))


def test_what_cannot_be_compressed(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"too little: these matrices need at least 2\."):
        lq.run(asked(base, bits=1.5), tmp_path, Silent())
    with pytest.raises(InputError, match=r"Rank 20 is larger than the smaller side of .*use at most 16"):
        lq.run(asked(base, rank=20), tmp_path, Silent())
    tensors = load_file(base / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * float("nan")}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        lq.run(asked(broken), tmp_path, Silent())
    tensors.pop(name)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of its matrices \('model\.layers\.1\.mlp\.up_proj'\)"):
        lq.run(asked(broken), tmp_path, Silent())


def test_sizes_that_no_block_divides_are_refused_or_filled_up(tmp_path: Path) -> None:
    odd = tiny.llama(tmp_path / "odd", hidden=24)
    with pytest.raises(InputError, match=r"No configuration divides the 24 x 24 weights of .* switch padding on"):
        lq.run(asked(odd, rank=2), tmp_path, Silent())
    result = lq.run(asked(odd, rank=2, bits=4, padding=True, name="odd"), tmp_path, Silent())
    assert result["bits"] <= 4
    with torch.no_grad():
        assert bool(open_model(result["path"]).model(IDS).logits.isfinite().all())


def test_fisher_information_of_another_model_is_refused(base: Path, chats: Path, tmp_path: Path) -> None:
    config = asked(base, data=str(chats), samples=2)
    with pytest.raises(Cancelled):
        lq.run(config, tmp_path, Stopping("measuring", 1))
    held = load_file(tmp_path / lq.FISHER)
    assert all(bool((square >= 0).all()) and bool(square.any()) for square in held.values())
    save_file(held, tmp_path / lq.FISHER, {"base": "another"})
    with pytest.raises(InputError, match="measured on another model"):
        lq.run(config, tmp_path, Silent(), resume=True)


def test_fisher_information_is_the_mean_of_squared_gradients_of_single_rows(base: Path, chats: Path) -> None:
    found = squares(asked(base, data=str(chats), samples=3), Base.of(str(base)), Silent())
    opened = open_model(base)
    from studio.datasets.seeds import rng
    from studio.training.language.data import Collate
    from studio.training.tasks.language import task_for

    task = task_for(settings(base, chats, max_length=512, too_long="cut", loss_on="all", seed=0))
    task.rows()
    samples = list(task.tokens(opened.tokenizer).shown)
    rng(0, "compress").shuffle(samples)
    weight = opened.model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    total = torch.zeros_like(weight)
    for sample in samples[:3]:
        (gradient,) = torch.autograd.grad(opened.model(**Collate(0)([sample])).loss, weight)
        total += gradient.square() / 3
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], total, rtol=1e-4, atol=1e-12)


def test_the_command(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compress", "lq", str(base), "--bits", "2.5", "--rank", "2", "--steps", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bits"] <= 2.5
    assert library.find(result["library"], "base").path.is_dir()
    assert cli.run(["compress", "lq", str(base), "--bits", "0"]) == 2
    assert cli.run(["compress", "backends", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"4bit", "int4", "gptq"} <= set(listed)
    assert all(one["works"] or one["reason"] for one in listed.values())


def test_a_packaged_base_is_checked_without_being_unpacked(monkeypatch):
    """Whichever it is: the list of packaged models says, and what kind they are."""
    from dataclasses import replace
    from types import SimpleNamespace

    from studio.library import packaged, smollm2

    def unpack(model):
        raise AssertionError("it is unpacked when it is used")

    writes = replace(smollm2.PACKAGED, name="another")
    listens = replace(writes, name="listens", kind="speech model")
    monkeypatch.setattr(packaged, "known", lambda: {one.name: one for one in (writes, listens)})
    monkeypatch.setattr(packaged.Packaged, "prepare", unpack)
    for check in (ready.base_and_rows, ready.base_to_prune):
        check(SimpleNamespace(base="another"))
        with pytest.raises(InputError, match="'listens' is a speech model"):
            check(SimpleNamespace(base="listens"))
