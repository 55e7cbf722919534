"""A bundle from an adapter, and the adapter on another base: what is kept, who answers, what learns."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import Cancelled, FamilyError, InputError, MissingDependencyError
from adapters.generation.trans_lora import soft_loss
from adapters.progress import Silent
from pipelines.language.loading import open_model
from studio.cli.app import run
from studio.transfer import bundle as bundles
from studio.transfer import discriminator, job, preparation, ready, shared, writing
from studio.transfer.schema import PrepareTransferConfig, TransferConfig
from studio.transfer.student import StudentTask
from tests.language import tiny
from tests.transfer.conftest import ANSWER, ROWS, rows_file


def lines(place) -> list[dict]:
    return [json.loads(line) for line in Path(place).read_text().splitlines()]


def with_adapter(base: Path, adapter: Path):
    """A base with an adapter, as PEFT has it, and its tokenizer."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), \
        AutoTokenizer.from_pretrained(base)  # fmt: skip


def asked(tokenizer, text: str) -> torch.Tensor:
    talk = [{"role": "user", "content": text}]
    given = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    return tokenizer(given, return_tensors="pt", add_special_tokens=False)["input_ids"]


def answer(model, tokenizer, text: str) -> str:
    given = asked(tokenizer, text)
    made = model.generate(input_ids=given, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ the bundle


def test_a_bundle_says_what_it_holds_and_is_read_back(world):
    found = bundles.read(world.bundle)
    assert found.base == "source"
    assert found.rows == len(ROWS)
    assert len(found.seeds) == 5
    assert set(found.seeds) < set(ROWS)
    assert found.judged["accuracy"] > 0.9
    assert found.judged["p_chance"] < 0.05
    assert found.judged == pytest.approx(world.measured["discriminator"])
    for place in (found.adapter, found.discriminator):
        assert sorted(file.name for file in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    given = load_file(world.adapter / "adapter_model.safetensors")
    kept = load_file(found.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in given.items())


def test_no_row_but_the_seeds_is_in_any_file_that_is_left(world):
    seeds = bundles.read(world.bundle).seeds
    stored = [file.read_bytes() for place in (world.bundle, world.folder / "prepare") for file in place.rglob("*")
              if file.is_file()]  # fmt: skip
    for text in ROWS:
        assert any(text.encode() in content for content in stored) == (text in seeds)


def test_the_discriminator_learns_the_one_token_of_yes_or_no(world, tmp_path):
    template = bundles.read(world.bundle).template
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(discriminator.row(template, "some text", True)) + "\n")
    config = world.preparing().trained(str(world.source), str(data), "it")
    task = discriminator.JudgeTask(config, template)
    task.rows()
    tokenizer = AutoTokenizer.from_pretrained(world.source)
    learnt = [label for label in task.encoded(tokenizer).shown[0]["labels"] if label >= 0]
    assert tokenizer.decode(learnt) == "y"


# ------------------------------------------------------------------------------------------------ the transfer


@pytest.fixture(scope="module")
def moved(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved")
    test = rows_file(folder / "test.jsonl", [*ROWS, "one more"])
    return job.run(
        world.moving(test_data=str(test), epochs=40, count=12, validation_split=0.25), folder / "run", Silent()
    )


def test_the_target_learns_what_the_source_answers_to_new_inputs(world, moved):
    made = lines(moved["examples"])
    assert len(made) == moved["kept"] == 12
    assert len({one["prompt"] for one in made}) == 12
    assert not {one["prompt"] for one in made} & set(ROWS)
    source, spelling = with_adapter(world.source, world.adapter)
    judge, _ = with_adapter(world.source, bundles.read(world.bundle).discriminator)
    yes, no = (spelling.convert_tokens_to_ids(word) for word in "yn")
    template = bundles.read(world.bundle).template
    for one in made:
        assert one["completion"] == answer(source, spelling, one["prompt"]).strip()
        logits = judge(input_ids=asked(spelling, template.asked(one["prompt"]))).logits[0, -1]
        assert one["margin"] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-3)
    assert {one["completion"] for one in made} == {ANSWER}
    assert moved["test"] == {"rows": 36, "source": 1.0, "target base": 0.0, "transferred": 1.0}
    target, other = with_adapter(world.target, Path(moved["adapter"]))
    assert spelling.get_vocab() != other.get_vocab()
    assert answer(target, other, "never asked before") == ANSWER
    with source.disable_adapter():
        assert answer(source, spelling, made[0]["prompt"]) != ANSWER


def test_the_report_has_the_numbers_and_no_paths(world, moved, capsys):
    folder = Path(moved["examples"]).parent
    told = json.loads((folder / "report.json").read_text())
    assert told["outcomes"]["kept"] == 12
    assert told["drawn"] == sum(told["outcomes"].values())
    assert told["acceptance"] == pytest.approx(12 / told["drawn"])
    assert told["distinct_1"] > 0.5
    assert str(world.folder) not in json.dumps(told)
    recipe = json.loads((folder / "training/transferred/adapter_config.json").read_text())
    assert recipe["base_model_name_or_path"] == "target"
    assert run(["transfer", "report", str(folder)]) == 0
    assert "exact answers to 36 test rows" in capsys.readouterr().out
    assert run(["transfer", "report", str(world.folder)]) == 2


def test_nothing_but_the_student_learns(world, tmp_path, monkeypatch):
    opened, students = [], []
    real, export = shared.open_model, StudentTask.export
    monkeypatch.setattr(shared, "open_model", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    monkeypatch.setattr(StudentTask, "export", lambda self, *a: students.append(self) or export(self, *a))
    job.run(world.moving(), tmp_path, Silent())
    assert len(opened) == 2
    for base in opened:
        assert all(not one.requires_grad and one.grad is None for one in base.model.parameters())
    before = AutoModelForCausalLM.from_pretrained(world.target).state_dict()
    for name, value in students[0].learner.named_parameters():
        assert value.requires_grad == ("lora_" in name)
        if "lora_" not in name:
            assert value.grad is None
            assert torch.equal(value, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])


def test_kept_have_a_margin_above_tau_and_one_seed_gives_the_same(world, moved, tmp_path):
    tau = sorted(one["margin"] for one in lines(moved["examples"]))[4]
    first, again = (job.run(world.moving(tau=tau), tmp_path / name, Silent()) for name in ("first", "again"))
    assert first["outcomes"]["rejected"]
    assert first["kept"] == 8
    assert all(one["margin"] > tau for one in lines(first["examples"]))
    assert Path(first["examples"]).read_bytes() == Path(again["examples"]).read_bytes()
    one, two = (load_file(Path(made["adapter"]) / "adapter_model.safetensors") for made in (first, again))
    assert all(torch.equal(one[name], value) for name, value in two.items())
    other = job.run(world.moving(tau=tau, seed=1), tmp_path / "other", Silent())
    assert Path(first["examples"]).read_bytes() != Path(other["examples"]).read_bytes()


def test_without_the_filter_the_discriminator_is_not_asked(world, tmp_path, monkeypatch):
    monkeypatch.setattr(discriminator, "margins", lambda *given: pytest.fail("the discriminator was asked"))
    found = job.run(world.moving(filter=False, tau=1000.0), tmp_path, Silent())
    assert found["kept"] == 8
    assert not found["outcomes"].get("rejected")
    assert all("margin" not in one for one in lines(found["examples"]))


@pytest.mark.parametrize("kind", ["dora", "prompt"])
def test_other_kinds_of_adapter_learn_it_too(world, tmp_path, kind):
    test = rows_file(tmp_path / "test.jsonl", ["a question", "and another one"])
    rate = {"dora": 0.02, "prompt": 0.3}[kind]
    config = world.moving(peft=kind, epochs=60, learning_rate=rate, test_data=str(test), validation_split=0.25)
    found = job.run(config, tmp_path / "run", Silent())
    assert found["loss"] < found["first_loss"] - 0.1  # the frozen head of so small a base allows no small loss
    model, tokenizer = with_adapter(world.target, Path(found["adapter"]))
    kept = json.loads((Path(found["adapter"]) / "adapter_config.json").read_text())
    assert kept["peft_type"] == ("PROMPT_TUNING" if kind == "prompt" else "LORA")
    assert kept.get("use_dora", False) == (kind == "dora")
    if kind == "dora":
        assert found["test"]["transferred"] == 1.0
        assert answer(model, tokenizer, "a question") == ANSWER
    else:
        assert {name for name, value in model.named_parameters() if value.shape[0] == 16}
        assert found["parameters"] == 768
    assert ("library" in job.kept(config, found)) == (kind == "dora")


def test_soft_labels_are_the_probabilities_of_the_source(world, tmp_path):
    refused("another tokenizer or chat template", lambda: job.run(world.moving(teacher="kl"), tmp_path, Silent()))
    same = tiny.llama(tmp_path / "same", seed=5, hidden=48)
    found = job.run(world.moving(to=str(same), teacher="kl", epochs=20), tmp_path / "run", Silent())
    assert found["loss"] < 0.7 * found["first_loss"]
    begun = {"training": {"continue_from": str(world.adapter), "save_every": 0}}  # with the source's own adapter
    itself = job.run(world.moving(to=str(world.source), teacher="kl", **begun), tmp_path / "itself", Silent())
    assert itself["first_loss"] == pytest.approx(0.0, abs=1e-5)


def test_the_soft_loss_is_the_divergence_at_learnt_tokens():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 7)
    p, q = teacher[0, 2].softmax(-1), student[0, 2].softmax(-1)
    found = soft_loss(student, teacher, torch.tensor([[-100, -100, -100, 1]]))
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()))


def test_from_a_base_to_itself(world, tmp_path):
    test = rows_file(tmp_path / "test.jsonl", ["a question", "and another one"])
    found = job.run(
        world.moving(to=str(world.source), count=16, epochs=20, test_data=str(test)), tmp_path / "run", Silent()
    )
    assert found["test"]["source"] == 1.0 == found["test"]["transferred"]


class StopAfter(Silent):
    """Asks to stop when so many inputs are kept."""

    def __init__(self, kept: int) -> None:
        self.kept, self.stop = kept, False

    def report(self, progress) -> None:
        self.stop |= progress.stage == "writing inputs" and progress.step >= self.kept

    def cancelled(self) -> bool:
        return self.stop


def test_a_stopped_transfer_goes_on_as_if_it_had_not(world, tmp_path):
    config = world.moving(batch=4)
    whole = job.run(config, tmp_path / "whole", Silent())
    with pytest.raises(Cancelled):
        job.run(config, tmp_path / "part", StopAfter(2))
    with (tmp_path / "part/written.jsonl").open("a") as handle:
        handle.write('[{"text": "cut o')  # the process was killed while it wrote
    part = job.run(config, tmp_path / "part", Silent(), resume=True)
    assert Path(part["examples"]).read_bytes() == Path(whole["examples"]).read_bytes()
    with pytest.raises(InputError, match="belongs to another transfer"):
        job.run(world.moving(batch=4, seed=3), tmp_path / "part", Silent(), resume=True)


def test_by_command_from_an_adapter_to_another_base(world, tmp_path, capsys):
    options = ["--base", str(world.source), "--data", str(world.rows), "--yes", "y", "--no", "n", "--epochs", "1",
               "--prompting", "plain", "--input-tokens", "8", "--out", str(tmp_path / "bundle"), "--quiet", "--json",
               "--force"]  # fmt: skip
    assert run(["transfer", "prepare", str(world.adapter), *options]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(tmp_path / "bundle")
    moving = ["transfer", str(world.adapter), "--to", str(world.target), "--base", str(world.source), "--no-filter"]
    short = ["--count", "4", "--epochs", "1", "--prompting", "plain", "--input-tokens", "8", "--answer-tokens", "8"]
    assert run([*moving, *short, "--name", "moved", "--quiet"]) == 0
    assert "moved" in capsys.readouterr().out
    assert run(["transfer", "report", "last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 4
    assert run([*moving, *short, "--tau", "nan"]) == 2
    assert run(["transfer", "prepar"]) == 2


# ------------------------------------------------------------------------------------------------ bad input


def refused(sentence, work, error=InputError):
    with pytest.raises(error, match=sentence) as found:
        work()
    assert "\n" not in str(found.value)


def changed(bundle: Path, place: Path, file: str, content: str) -> Path:
    """A copy of a bundle with another file, as if it had been made so."""
    shutil.copytree(bundle, place)
    (place / file).write_text(content)
    head = json.loads((place / bundles.MANIFEST).read_text())
    head["files"] = bundles._hashes(place)
    (place / bundles.MANIFEST).write_text(json.dumps(head))
    return place


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seeds": 0}, "seeds"),
        ({"question": "Is it?"}, "needs {input}"),
        ({"input_pattern": "["}, "no regular expression"),
        ({"training": {"data": "x"}}, "'data' has a field of its own"),
        ({"training": {"stesp": 1}}, "did you mean 'steps'"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_preparations_that_cannot_be_meant_are_refused(values, sentence):
    base = {"adapter": "a", "base": "b", "data": "d.jsonl"}
    refused(sentence, lambda: PrepareTransferConfig.parse(base | values))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 0}, "count"), ({"tau": float("nan")}, "tau"), ({"tau": float("inf")}, "tau"),
        ({"temperature": 0.0}, "temperature"), ({"validation_split": 1.0}, "validation_split"),
        ({"peft": "ia3"}, "'lora', 'dora' or 'prompt'"),
    ],
)  # fmt: skip
def test_transfers_that_cannot_be_meant_are_refused(values, sentence):
    refused(sentence, lambda: TransferConfig.parse({"bundle": "b", "to": "t"} | values))


def test_rows_that_show_no_task_are_refused(world, tmp_path):
    def prepare(name, texts, **values):
        place = tmp_path / name
        place.write_text("".join(json.dumps(one) + "\n" for one in texts))
        return lambda: preparation.prepare(
            world.preparing(data=str(place), **values), tmp_path / f"{name}-job", Silent()
        )

    plain = [{"prompt": f"{number}", "completion": f"{number}"} for number in range(12)]
    refused("holds plain texts", prepare("texts.jsonl", [{"text": "a"}]))
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    refused("not one question with one answer", prepare("turns.jsonl", [{"messages": turns}]))
    systems = [{"messages": [{"role": "system", "content": str(number)}, *turns[:2]]} for number in range(2)]
    refused("different system prompts", prepare("systems.jsonl", systems))
    refused("has the form 'choice'", prepare("choice.jsonl", plain, form="choice"))
    refused("which are no labels", prepare("labels.jsonl", plain, form="classification"))
    refused("needs two different inputs or more", prepare("few.jsonl", plain[:1]))
    assert not any(tmp_path.glob("*-job/work"))
    with_two = prepare("two.jsonl", plain[:2], discriminator=False, form="math")()
    assert with_two["discriminator"] == {}
    assert "There are only 2 seeds" in with_two["remarks"][0]


def test_words_of_several_tokens_are_refused(world, tmp_path):
    refused("one token each", lambda: preparation.prepare(world.preparing(yes="Yes"), tmp_path, Silent()))
    refused("one token each", lambda: preparation.prepare(world.preparing(yes="ya", no="no"), tmp_path, Silent()))


def test_a_discriminator_at_chance_is_kept_only_by_force(world, tmp_path, monkeypatch):
    monkeypatch.setattr(discriminator, "margins", lambda *given: [1.0 for _ in given[3]])
    quick = {"epochs": 1, "training": {"save_every": 0}}
    refused(
        "no better than chance: right for", lambda: preparation.prepare(world.preparing(**quick), tmp_path, Silent())
    )
    assert not (tmp_path / "work").exists()
    found = preparation.prepare(world.preparing(force=True, **quick), tmp_path, Silent())
    assert "no better than chance" in found["remarks"][-1]


def test_bundles_that_are_not_as_they_were_made_are_refused(world, tmp_path):
    refused("is no transfer bundle", lambda: bundles.read(tmp_path))
    place = tmp_path / "copy"
    shutil.copytree(world.bundle, place)
    (place / "seeds.jsonl").write_text('{"input": "other"}\n')
    refused("'seeds.jsonl' is missing, new or changed", lambda: bundles.read(place))
    shutil.rmtree(place / "discriminator")
    refused("is missing, new or changed", lambda: bundles.read(place))
    refused("has no seeds", lambda: bundles.read(changed(world.bundle, tmp_path / "empty", "seeds.jsonl", "")))
    refused("is damaged", lambda: bundles.read(changed(world.bundle, tmp_path / "odd", "template.json", "[]")))
    (place / bundles.MANIFEST).write_text('{"version": 9}')
    refused("of version 9", lambda: bundles.read(place))


def test_a_filter_needs_a_discriminator(world, tmp_path):
    made = preparation.prepare(world.preparing(discriminator=False), tmp_path / "job", Silent())["bundle"]
    refused("has no discriminator", lambda: ready.transfer(world.moving(bundle=made)))
    refused("has no discriminator", lambda: job.run(world.moving(bundle=made), tmp_path / "run", Silent()))
    ready.transfer(world.moving(bundle=made, filter=False))
    assert job.run(world.moving(bundle=made, filter=False), tmp_path / "run", Silent())["kept"] == 8


def test_another_source_is_refused(world, tmp_path):
    other = tiny.llama(tmp_path / "other", seed=3)
    refused("is not the base of this bundle", lambda: job.run(world.moving(base=str(other)), tmp_path, Silent()),
            FamilyError)  # fmt: skip
    spelled = tmp_path / "spelled"
    shutil.copytree(world.source, spelled)
    tiny.tokenizer(backwards=True).save_pretrained(spelled)
    refused("or its weights or tokenizer differ", lambda: job.run(world.moving(base=str(spelled)), tmp_path, Silent()),
            FamilyError)  # fmt: skip
    refused("another vocabulary or chat template",
            lambda: bundles.check_tokenizer(bundles.read(world.bundle), tiny.tokenizer(backwards=True), "it"),
            FamilyError)  # fmt: skip


def test_targets_that_cannot_be_trained_are_refused(world, tmp_path):
    def run_to(place, **values):
        return lambda: job.run(world.moving(to=str(place), **values), tmp_path / "run", Silent())

    refused("cannot do the task 'causal'", run_to(tiny.bert(tmp_path / "bert")), FamilyError)
    head = tmp_path / "head"
    shutil.copytree(world.target, head)
    weights = load_file(head / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")[:2].clone()
    save_file(weights, head / "model.safetensors", {"format": "pt"})
    refused("incomplete: 'lm_head'", run_to(head))
    refused("no chat template", run_to(tiny.gpt2(tmp_path / "plain"), prompting="chat"))
    refused("The seeds and a new input need", run_to(tiny.llama(tmp_path / "short", max_position_embeddings=64)))
    endless = tmp_path / "endless"
    shutil.copytree(world.target, endless)
    told = json.loads((endless / "tokenizer_config.json").read_text())
    del told["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(told))
    refused("has no end token", run_to(endless))
    if importlib.util.find_spec("torchao") is None:
        refused("needs the package 'torchao'", run_to(world.target, training={"quantization": "int8"}),
                MissingDependencyError)  # fmt: skip


def test_a_target_that_writes_nothing_new_is_given_up(world, tmp_path, monkeypatch):
    for name, made, why in (
        ("empty", "", "had another form"), ("same", "again and again", "repeated earlier ones"),
    ):  # fmt: skip
        monkeypatch.setattr(writing, "sampled", lambda *given, made=made: [made] * len(given[2]))
        refused(f"acceptance .*{why}", lambda name=name: job.run(world.moving(tries=5), tmp_path / name, Silent()))


def test_an_empty_line_ends_an_input_unless_seeds_have_some(world, monkeypatch):
    stops = []
    monkeypatch.setattr(writing, "sampled", lambda *given: stops.append(given[3].stop) or [])
    base = open_model(world.source)
    for seeds in (["one line", "one\nmore"], ["one", "with an\n\nempty line"]):
        writing.Writer(base, world.moving(), seeds).batch(0)
    assert stops == [("\n### Example", "\n\n"), ("\n### Example",)]


def test_a_filter_that_rejects_everything_is_told(world, tmp_path):
    refused(r"Only 0 of \d+ .*acceptance 0.0%; .* rejected by the discriminator.*Lower tau",
            lambda: job.run(world.moving(tau=1000.0, tries=4), tmp_path, Silent()))  # fmt: skip
