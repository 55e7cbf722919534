"""Rows, conversations and tokens: what is learnt, what is packed, and what is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InputError
from studio.datasets.conversations import Columns, conversations
from studio.datasets.encoding import IGNORED, encode_all, encode_conversation, pack
from studio.datasets.texts import scan, usable_rows
from studio.training.drivers.trainer import RunSampler
from studio.training.language.about import known
from studio.training.language.check import check_data
from studio.training.language.data import Collate
from studio.training.language.rows import split
from studio.training.schemas.language import TrainLanguageConfig
from studio.training.tasks.classification import macro_f1
from studio.training.tasks.language import task_for
from studio.training.tasks.masked import masked
from tests.language import tiny
from tests.language.conftest import samples_of, settings, write_rows


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------------ rows


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "zwei\nZeilen", "completion": "ü"}]
    write_rows(tmp_path / "r.jsonl", rows)
    write(tmp_path / "r.json", json.dumps(rows))
    write(tmp_path / "r.csv", 'prompt,completion\n"a, b","say ""x"""\n"zwei\nZeilen",ü\n')
    write(tmp_path / "r.tsv", 'prompt\tcompletion\na, b\t"say ""x"""\n"zwei\nZeilen"\tü\n')
    for ending in ("jsonl", "json", "csv", "tsv"):
        assert [row.values for row in scan(str(tmp_path / f"r.{ending}")).rows] == rows, ending
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: adapter-studio[language]")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert [row.values for row in scan(str(tmp_path / "r.parquet")).rows] == rows
    paragraphs = scan(str(write(tmp_path / "r.txt", "one\ntwo\n\n\nthree\n"))).rows
    assert [row.values["text"] for row in paragraphs] == ["one\ntwo", "three"]


def test_broken_rows_are_named_by_line(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"text": "a"}\n\noops\n{"text": "b"}\n[1]\n\xff\xfe\n')
    with pytest.raises(InputError, match=r"3 unreadable rows \(line 3: not JSON.*line 5: .*list; line 6: not UTF-8"):
        usable_rows(scan(str(file)))
    assert [row.number for row in usable_rows(scan(str(file)), skip_broken=True).rows] == [1, 4]
    table = write(tmp_path / "r.csv", 'a,b\n1,2\n"x\ny",2\n1\n1,2,3\n')
    assert scan(str(table)).broken == {5: "1 values for 2 columns", 6: "3 values for 2 columns"}


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("r.jsonl", "", "holds no rows"),
    ("r.csv", "a,a\n1,2\n", "name every column once"),
    ("r.json", "{", "is not JSON"),
    ("r.xlsx", "x", "is not text data"),
    ("r.parquet", "x", "not a readable parquet|pyarrow"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, sentence):
    with pytest.raises((InputError, ImportError), match=sentence):
        usable_rows(scan(str(write(tmp_path / name, content))))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        scan(str(tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        scan(str(tmp_path))


@given(st.lists(st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.none(), min_size=1), min_size=1))
def test_json_lines_come_back(tmp_path_factory, rows):
    file = write_rows(tmp_path_factory.mktemp("h") / "r.jsonl", rows)
    report = scan(str(file))
    assert [row.values for row in report.rows] == rows
    assert not report.broken


# ------------------------------------------------------------------------------------------------ conversations


def test_the_usual_shapes_of_conversations(tmp_path):
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    halves = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}
    made = []
    for number, row in enumerate((alpaca, sharegpt, halves)):
        report = scan(str(write_rows(tmp_path / f"{number}.jsonl", [row])))
        made.append([(m["role"], m["content"]) for m in conversations(report, Columns(), "be kind")[0].messages])
    assert made[0] == [("system", "be kind"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    assert made[1] == made[2] == [("system", "be kind"), ("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize(("row", "sentence"), [
    ({"a": "x"}, "needs 'messages', or 'prompt' and 'completion', or 'text'"),
    ({"messages": "x"}, "line 1: 'messages' is not a list"),
    ({"messages": [{"role": "pilot", "content": "x"}]}, "message 1 has the role 'pilot'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message from the assistant"),
    ({"prompt": "x", "completion": " "}, "line 1: 'completion' is empty"),
    ({"prompt": "x", "completion": 3}, "'completion' is not text but int"),
])  # fmt: skip
def test_rows_that_are_no_conversation(tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence):
        conversations(scan(str(write_rows(tmp_path / "r.jsonl", [row]))), Columns())


def test_a_column_that_is_not_there_names_the_nearest(tmp_path):
    report = scan(str(write_rows(tmp_path / "r.jsonl", [{"question": "a", "answers": "b"}])))
    with pytest.raises(InputError, match=r"no column 'answer' \(did you mean 'answers'"):
        conversations(report, Columns(completion="answer"))
    assert conversations(report, Columns(completion="answers"))[0].messages[1]["content"] == "b"


# ------------------------------------------------------------------------------------------------ tokens


def learnt(sample, tokenizer) -> str:
    return tokenizer.decode([token for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
                             if label != IGNORED])  # fmt: skip


def test_only_the_assistants_turns_are_learnt(tmp_path):
    tokenizer = tiny.tokenizer()
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"}]  # fmt: skip
    report = scan(str(write_rows(tmp_path / "r.jsonl", [{"messages": talk}])))
    items = conversations(report, Columns())
    sample = encode_all(items, tokenizer, max_length=500).samples[0]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(sample["input_ids"]) == whole
    assert learnt(sample, tokenizer) == "two<|im_end|>\nfour<|im_end|>\n"
    everything = encode_all(items, tokenizer, max_length=500, loss_on="all").samples[0]
    assert everything["labels"] == everything["input_ids"]


def test_without_a_chat_template(tmp_path, bases, chats):
    tokenizer = tiny.tokenizer(template=False)
    pair = conversations(scan(str(chats)), Columns())[0]
    ids, mine = encode_conversation(pair, tokenizer)
    assert tokenizer.decode(ids) == "red1? der</s>"
    assert tokenizer.decode([token for token, own in zip(ids, mine, strict=True) if own]) == " der</s>"
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = write_rows(tmp_path / "r.jsonl", [talk] * 4)
    with pytest.raises(InputError, match=r"has no chat template.*'chatml'"):
        check_data(settings(bases("bare"), data))
    assert "[[b<|im_end|>" in check_data(settings(bases("bare"), data, chat_template="chatml"))["example"]
    with pytest.raises(InputError, match="neither 'chatml' nor a readable"):
        check_data(settings(bases("bare"), data, chat_template="nothing.jinja"))


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    item = conversations(scan(str(write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}]))), Columns())[
        0
    ]
    with pytest.raises(InputError, match="writes earlier turns differently"):
        encode_conversation(item, tokenizer)


def test_too_long_samples(tmp_path):
    rows = [{"prompt": "ab", "completion": "short"}, {"prompt": "ab", "completion": "l" + "o" * 80 + "ng"}]
    items = conversations(scan(str(write_rows(tmp_path / "r.jsonl", rows))), Columns())
    tokenizer = tiny.tokenizer()
    skipped = encode_all(items, tokenizer, max_length=50)
    assert (len(skipped.samples), skipped.skipped) == (1, [2])
    cut = encode_all(items, tokenizer, max_length=50, too_long="cut")
    assert [len(sample["input_ids"]) for sample in cut.samples][1] == 50
    assert cut.cut == [2]
    with pytest.raises(InputError, match=r"Row 2 has .* tokens, max_length is 50"):
        encode_all(items, tokenizer, max_length=50, too_long="refuse")
    with pytest.raises(InputError, match="No sample is left"):
        encode_all(items, tokenizer, max_length=8)
    with pytest.raises(InputError, match=r"No sample is left.*the cut leaves no answer"):
        encode_all(items, tokenizer, max_length=8, too_long="cut")


def test_long_plain_texts_become_several_samples(tmp_path):
    items = conversations(scan(str(write(tmp_path / "r.txt", "x" * 25))), Columns())
    samples = encode_all(items, tiny.tokenizer(template=False), max_length=10).samples
    assert [len(sample["input_ids"]) for sample in samples] == [10, 10, 6]
    assert samples[-1]["input_ids"][-1] == tiny.tokenizer(template=False).eos_token_id


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(30, 64))
def test_packing_loses_nothing(lengths, most):
    samples = [{"input_ids": [n] * length, "labels": [n] * length} for n, length in enumerate(lengths, 100)]
    rows = pack(samples, most)
    assert all(len(row["input_ids"]) <= most for row in rows)
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(
        token for sample in samples for token in sample["input_ids"]
    )
    for row in rows:
        starts = [number for number, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][start] == IGNORED for start in starts)
        assert sum(label == IGNORED for label in row["labels"]) == len(starts)
    wasted = sum(most - len(row["input_ids"]) for row in rows)
    assert wasted < most * len(rows) or len(rows) == 1
    used = sum(lengths)
    assert len(rows) <= 2 * -(-used // most) + 1  # first fit never needs twice the best


def test_padding_is_not_seen():
    batch = Collate(0)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]


def test_the_run_is_permutation_after_permutation():
    order = list(RunSampler(5, 13, seed=3))
    assert [sorted(order[start : start + 5]) for start in (0, 5)] == [[0, 1, 2, 3, 4]] * 2
    assert order[:5] != order[5:10]
    assert order == list(RunSampler(5, 13, seed=3))
    assert order[:10] == list(RunSampler(5, 10, seed=3))


def test_masks_are_as_bert_draws_them():
    tokenizer = tiny.tokenizer(template=False, frame=True)
    ids = torch.tensor([tokenizer.encode("the quick brown fox jumps over it " * 3)] * 60)
    batch = masked({"input_ids": ids}, tokenizer, 0.15, 0, "mask", 4)
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id)
    assert not (chosen & special).any()
    share = chosen.sum() / (~special).sum()
    gaps = (batch["input_ids"] == tokenizer.mask_token_id)[chosen].float().mean()
    kept = (batch["input_ids"] == ids)[chosen].float().mean()
    assert 0.13 < share < 0.17
    assert 0.76 < gaps < 0.84
    assert 0.06 < kept < 0.14
    again = masked({"input_ids": ids}, tokenizer, 0.15, 0, "mask", 4)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    one = masked({"input_ids": ids[:1, :4]}, tokenizer, 1e-9, 0, "mask", 0)
    assert (one["labels"] != IGNORED).sum() == 1  # never nothing


def test_macro_f1_is_sklearns_formula():
    pairs = [(0, 0), (0, 1), (1, 1), (1, 1), (2, 2), (0, 2)]  # (guess, truth)
    assert macro_f1(pairs) == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)


# ------------------------------------------------------------------------------------------------ the whole job's input


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"packing": True, "task": "masked"}, "packing is for the causal task"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
    ({"validation_data": "x.jsonl", "validation_split": 0.1}, "not from both"),
    ({"grad_rule": "allora", "dropout": 0.1}, "ALLoRA replaces dropout"),
    ({"target_regex": "("}, "not a regular expression"),
    ({"data": " "}, "name a file of rows"),
])  # fmt: skip
def test_configurations_that_cannot_work(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainLanguageConfig.parse({"data": "r.jsonl", **changes})


def test_the_configuration_comes_back_from_yaml(tmp_path):
    config = TrainLanguageConfig.parse({"data": "r.jsonl", "rank_pattern": {"q_proj": 4}, "sample_prompts": ["a: b"]})
    assert TrainLanguageConfig.from_yaml(write(tmp_path / "c.yaml", config.to_yaml())) == config


def test_every_language_task_is_what_its_file_declares():
    choices = get_args(TrainLanguageConfig.model_fields["task"].annotation)
    for name in choices:
        task = task_for(TrainLanguageConfig(data="r.jsonl", task=name))
        assert f"{type(task).__module__}:{type(task).__name__}" == known()[name].entry
        assert type(task).__module__.endswith(f".{name}")
    assert choices[0] == TrainLanguageConfig.model_fields["task"].default == "causal"


def test_too_few_rows_and_labels(tmp_path, bases, chats):
    with pytest.raises(InputError, match="too few to hold"):
        split(list(range(1)), 0.5, 0)  # type: ignore[arg-type]
    one = write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}] * 3)
    with pytest.raises(InputError, match="has only one label"):
        samples_of(settings(bases("bert"), one, task="classification"), None)
    learn = write_rows(tmp_path / "learn.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "z"}])
    with pytest.raises(InputError, match="The label 'z' is in the validation rows"):
        samples_of(settings(bases("bert"), learn, task="classification", validation_data=str(other)), None)
    config = settings(bases("llama"), chats, max_length=600)
    with pytest.raises(InputError, match="more than the 512 tokens"):
        samples_of(config, tiny.tokenizer(), 512)
