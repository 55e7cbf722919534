"""The parser of prompts: emphasis, parts, adapters, choices and wildcard files."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InputError
from pipelines.diffusion.prompt_syntax import (
    Adapter,
    Break,
    Choice,
    Emphasis,
    Node,
    Piece,
    Wildcard,
    chosen,
    has_choices,
    parse,
    read,
    without_adapters,
    written,
)
from pipelines.diffusion.wildcards import lines_of


def pieces(text: str) -> list[tuple[str, float]]:
    (part,) = read(text).parts
    return [(piece.text, round(piece.weight, 6)) for piece in part]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a ((red)) fox", [("a ", 1), ("red", 1.21), (" fox", 1)]),
        ("[red] fox", [("red", 0.909091), (" fox", 1)]),
        ("(a (red:2) fox:0.5)", [("a ", 0.5), ("red", 1), (" fox", 0.5)]),
        (r"a \(red\) fox", [("a (red) fox", 1)]),
        ("a (red:b) fox", [("a ", 1), ("red:b", 1.1), (" fox", 1)]),
        ("(3:4:1.2)", [("3:4", 1.2)]),
        ("smile :( and (", [("smile :( and (", 1)]),
        ("ratio 3:4 } {a} |", [("ratio 3:4 } {a} |", 1)]),
        ("<s0><s1> a <fox1>", [("<s0><s1> a <fox1>", 1)]),
        ("(a fox:-0.5)", [("a fox", -0.5)]),
        ("", [("", 1)]),
    ],
)
def test_emphasis(text: str, wanted: list[tuple[str, float]]) -> None:
    assert pieces(text) == wanted


def test_parts() -> None:
    assert [[piece.text for piece in part] for part in read("a fox BREAK a (cat) BREAK").parts] == [
        ["a fox "], [" a ", "cat", " "], [""],
    ]  # fmt: skip
    assert read("BREAKFAST").plain


@pytest.mark.parametrize(
    ("text", "rest", "adapters"),
    [
        ("a fox <lora:cactus:0.8>", "a fox", [Adapter("cactus", 0.8)]),
        ("a <lora:cactus> fox", "a fox", [Adapter("cactus")]),
        ("fox, <lora:my.v2:0.6:0.9>, snow", "fox, snow", [Adapter("my.v2", 0.9, 0.6)]),
        ("fox <lora:a:te=0:unet=1>", "fox", [Adapter("a", 1.0, 0.0)]),
        ("<lora:a:0.5><lora:a:0.25> fox", "fox", [Adapter("a", 0.75)]),
        ("(a <lora:a:1> fox:1.2)", "(a fox:1.2)", [Adapter("a")]),
        (r"a fox \<lora:a:1>", r"a fox \<lora:a:1>", []),
    ],
)
def test_adapters(text: str, rest: str, adapters: list[Adapter]) -> None:
    assert without_adapters(text) == (rest, adapters)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<lora::1>", "not an adapter"),
        ("<lora:a:b>", "must be a number"),
        ("<lora:a:inf>", "must be a number"),
        ("<hypernet:a:1>", "hypernetwork"),
        ("a [cat:dog:0.5]", "change over the steps"),
        ("a [cat|dog]", "change over the steps"),
        ("(" * 60 + "a" + ")" * 60, "deep"),
    ],
)
def test_what_is_not_honoured_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(text)


def test_choices_follow_seed_and_shares() -> None:
    text = "a {red|3::green|blue} fox"
    drawn = Counter(chosen(text, seed, lines_of(None)) for seed in range(500))
    assert set(drawn) == {"a red fox", "a green fox", "a blue fox"}
    assert drawn["a green fox"] > 2 * drawn["a red fox"]
    assert chosen(text, 3, lines_of(None)) == chosen(text, 3, lines_of(None))
    two = {chosen("{2$$a|b|c}", seed, lines_of(None)) for seed in range(60)}
    assert two == {f"{x}, {y}" for x in "abc" for y in "abc" if x != y}
    assert {chosen("{ |very }{a|<lora:b:1>}", seed, lines_of(None)) for seed in range(60)} == {
        " a", "very a", " <lora:b:1.0>", "very <lora:b:1.0>",
    }  # fmt: skip


def test_wildcard_files(tmp_path) -> None:
    (tmp_path / "colour.txt").write_text("# two\nred\n\n (green:1.2) \n", encoding="utf-8")
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "wild.txt").write_text("{fox|wolf} __colour__\n", encoding="utf-8")
    (tmp_path / "loop.txt").write_text("a __loop__\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("#\n", encoding="utf-8")
    lines = lines_of(tmp_path)
    assert {chosen("__colour__ fox", seed, lines) for seed in range(40)} == {"red fox", "(green:1.2) fox"}
    assert len({chosen("__animals/wild__", seed, lines) for seed in range(60)}) == 4
    assert chosen("a plain (text)", 0, lines) == "a plain (text)"
    for text, said in (("__color__", "colour"), ("__loop__", "refers to itself"), ("__empty__", "no line"),
                       ("__a/../../b__", "no file")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            chosen(text, 0, lines)
    with pytest.raises(InputError, match="no folder"):
        chosen("__colour__", 0, lines_of(None))


LETTERS = st.text(st.sampled_from("ab ,:|()[]{}\\<>_.1"), min_size=1, max_size=8)
NUMBERS = st.floats(-9, 9, allow_nan=False).map(lambda value: round(value, 3))
NAMES = st.from_regex(r"[a-z][a-z0-9.]{0,5}[a-z]", fullmatch=True)
LEAVES: st.SearchStrategy[Node] = st.one_of(
    LETTERS,
    st.builds(Adapter, NAMES, NUMBERS),
    st.builds(Wildcard, NAMES),
    st.just(Break()),
)


def joined(nodes: list[Node]) -> tuple[Node, ...]:
    """Neighbouring texts as one, as a parser gives them; a space keeps BREAK a word and underscores apart."""
    made: list[Node] = []
    for node in nodes:
        if isinstance(node, str) and made and isinstance(made[-1], str):
            made[-1] += f"{node} "
        elif isinstance(node, str):
            made.append(f" {node} ")
        else:
            made += [node] if made and isinstance(made[-1], str) else [" ", node]
    return (*made, " ") if made and not isinstance(made[-1], str) else tuple(made)


def options(inner: st.SearchStrategy[tuple[Node, ...]]) -> st.SearchStrategy[Node]:
    shares = st.sampled_from([1.0, 0.5, 3.0])
    return st.builds(
        lambda made, count: Choice(tuple(made), min(count, len(made))),
        st.lists(st.tuples(shares, inner), min_size=2, max_size=3), st.integers(1, 3),
    )  # fmt: skip


TREES = st.recursive(
    st.lists(LEAVES, min_size=1, max_size=3).map(joined),
    lambda inner: st.lists(st.one_of(LEAVES, st.builds(Emphasis, inner, NUMBERS), options(inner)), min_size=1,
                           max_size=3).map(joined),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_what_is_written_is_read_again(tree: tuple[Node, ...]) -> None:
    assert parse(written(tree)) == tree


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab ,:|()[]{}\\<>_.1$lora"), max_size=40))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    try:
        tree = parse(text)
    except InputError:
        return
    assert parse(written(tree)) == tree
    if not has_choices(text):
        assert sum(len(piece.text) for part in read(text).parts for piece in part) <= len(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_characters="()[]{}\\<_B"), max_size=60))
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert read(text).parts == ((Piece(text),),)


@pytest.mark.parametrize(
    "text",
    ["(" * 50000, "[(" * 20000 + ")" * 20000, "__a" * 20000, "<lora:" * 20000, ":1 " * 20000, "(:" * 20000,
     "{a|" * 20000],
)  # fmt: skip
def test_long_odd_texts_are_read_quickly(text: str) -> None:
    begun = time.perf_counter()
    with contextlib.suppress(InputError):
        parse(text)
    assert time.perf_counter() - begun < 2
