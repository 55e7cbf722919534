"""Rows as people have them: everything in a row is used or named; tokens and mask beside TRL's own."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.errors import InputError
from studio.datasets.encoding import CHATML, IGNORED
from studio.training.schemas.language import TrainLanguageConfig
from tests.language.conftest import samples_of

PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}### Q: {{ m.content }}\n{% else %}### A: {{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### A: {% endif %}"
)
# As CHATML, and says which parts are the assistant's, as TRL wants it.
CHATML_WITH_ANSWERS_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}T{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template=CHATML, bos=False):
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {name: n for n, name in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    if bos:
        bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>" if template else "</s>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = template
    return made


@pytest.fixture
def read(tmp_path):
    def run(rows, tok=None, **options):
        """Samples, and (what is read, what is learnt) of each; what was said."""
        tok = tok or tokenizer()
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = TrainLanguageConfig(name="x", data=str(file), **options)
        made = samples_of(config, tok)
        texts = [(tok.decode(s["input_ids"]), tok.decode([t for t in s["labels"] if t != IGNORED])) for s in made.shown]
        return made, texts

    return run


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


LAYOUTS = {
    "openai": ({"messages": [user("q"), answer("a")]}, None),
    "openai, system": ({"messages": [{"role": "system", "content": "s"}, user("q"), answer("a")]}, None),
    "openai, turns": ({"messages": [user("q"), answer("a"), user("r"), answer("b")]}, None),
    "openai, parts": (
        {"messages": [user([{"type": "text", "text": "q"}]), answer([{"type": "text", "text": "a"}])]},
        {"messages": [user("q"), answer("a")]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [user("q"), answer("a")]},
    ),
    "alpaca": (
        {"instruction": "i", "input": "x", "output": "a"},
        {"prompt": [user("i\n\nx")], "completion": [answer("a")]},
    ),
    "alpaca, history": (
        {"instruction": "r", "input": "", "output": "b", "system": "s", "history": [["q", "a"]]},
        {"messages": [{"role": "system", "content": "s"}, user("q"), answer("a"), user("r"), answer("b")]},
    ),
    "halves": ({"prompt": [user("q")], "completion": [answer("a")]}, None),
    "question": ({"question": "q", "answer": "a"}, {"prompt": [user("q")], "completion": [answer("a")]}),
    "text": ({"text": "some words"}, None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_and_mask_are_those_of_trl(name, read, tmp_path):
    """What TRL's trainer makes of the row in its own form: its data preparation and its collator."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'adapter-studio[language]'")
    from datasets import Dataset

    row, same = LAYOUTS[name]
    sample = read([row])[0].shown[0]
    theirs = same or row
    tok = tokenizer(CHATML_WITH_ANSWERS_MARKED)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=256, eos_token=tok.eos_token,
        assistant_only_loss="messages" in theirs,
    )  # fmt: skip
    config = LlamaConfig(vocab_size=len(tok), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1)  # fmt: skip
    trainer = trl.SFTTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Dataset.from_list([theirs]),
                             processing_class=tok)  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert sample["input_ids"] == batch["input_ids"][0].tolist()
    assert sample["labels"] == batch["labels"][0].tolist()


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("training", False, True)])
def test_marked_turns_are_read_only(key, no, yes, loss_on, read):
    row = {"messages": [user("q"), answer("BAD", **{key: no}), user("r"), answer("GOOD", **{key: yes})]}
    everything, learnt = read([row], loss_on=loss_on)[1][0]
    assert "BAD" in everything
    assert "BAD" not in learnt
    assert "GOOD" in learnt


def test_strange_weights_are_refused(read):
    for mark in (0.5, "0"):
        with pytest.raises(InputError, match="line 1: message 2 has the weight"):
            read([{"messages": [user("q"), answer("a", weight=mark)]}])


def test_reasoning_tools_and_calls(read):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "tools": json.dumps([{"name": "f"}]),
        "messages": [user("w?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "content": "5"}, answer("five", reasoning_content="HM")],
    }  # fmt: skip
    everything, learnt = read([row], tokenizer(TOOLS))[1][0]
    assert everything.startswith('T[{"name": "f"}]<|im_end|>')
    assert 'f{"x": 1}<|im_end|>' in learnt
    assert "(HM)five" in learnt
    for missing, sentence in (("tools", "Row 1 has tool_calls"), ("messages", "Row 1 has tools")):
        other = {**row, **({"tools": None} if missing == "tools" else {"messages": [user("q"), answer("a")]})}
        with pytest.raises(InputError, match=sentence):
            read([other])
    made, texts = read([{"messages": [user("q"), answer("a", reasoning="WHY", name="bot")]}])
    assert "<think>\nWHY\n</think>\n\na" in texts[0][1]
    assert "reasoning is written as a <think> part" in made.remark
    assert "does not write 'name'" in made.remark


def test_what_is_not_used_is_named(read):
    made, _ = read([{"id": 7, "messages": [user("q", date="today"), answer("a")]}])
    assert "columns that are not used: id" in made.remark
    assert "the key 'date' of messages from the user is not used" in made.remark
    with pytest.raises(InputError, match="a part of type 'image_url': only text is read"):
        read([{"messages": [user([{"type": "image_url"}]), answer("a")]}])
    with pytest.raises(InputError, match="system column and another system message"):
        read([{"system": "x", "messages": [{"role": "system", "content": "y"}, user("q"), answer("a")]}])


def test_conversations_may_begin_with_the_assistant(read):
    row = {"messages": [answer("Hello!"), user("q"), answer("a")]}
    assert read([row])[1][0][1] == "Hello!<|im_end|>\na<|im_end|>\n"
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    with pytest.raises(InputError, match="cannot write row 2: user first"):
        read([{"messages": [user("q"), answer("a")]}, row], tokenizer(refusing))


def test_one_start_and_one_end(read):
    tok = tokenizer(None, bos=True)
    assert read([{"text": "<s>hello</s>"}], tok)[1][0][0] == "<s>hello</s>"
    assert read([{"prompt": "<s>ask", "completion": "answer</s>"}], tok)[1][0] == ("<s>ask answer</s>", " answer</s>")


def test_an_end_is_always_learnt(read):
    made, texts = read([{"messages": [user("q"), answer("yes")]}], tokenizer(PLAIN))
    assert texts[0][1] == "yes\n<|im_end|>"
    assert "an end token is added" in made.remark
    pieces = read([{"text": "x" * 32}], tokenizer(None), max_length=32)[0].shown
    assert [len(piece["input_ids"]) for piece in pieces] == [32, 2]
    assert pieces[1]["labels"][1] == tokenizer(None).eos_token_id


def test_skip_broken_skips_empty_answers_and_half_characters(read):
    rows = [{"prompt": "q", "completion": text} for text in ("a", "", "\ud800")]
    with pytest.raises(InputError, match="line 3: it holds half of a character"):
        read(rows)
    with pytest.raises(InputError, match="line 2: 'completion' is empty"):
        read(rows[:2])
    made, texts = read(rows, skip_broken=True)
    assert len(texts) == 1
    assert "1 row is left out (line 2: 'completion' is empty)" in made.remark
    assert "1 row is left out (line 3: it holds half of a character" in made.remark
