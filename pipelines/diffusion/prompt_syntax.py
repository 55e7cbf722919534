r"""The syntax of prompts beyond plain words: emphasis, parts, adapters, choices.

As in AUTOMATIC1111's web UI and its extension Dynamic Prompts:

    (word)  (word:1.3)  [word]     1.1 times, 1.3 times and 1 / 1.1 times as strong; nested ones multiply
    BREAK                          what follows starts a new part for encoders that read in parts
    <lora:name:0.8>                the adapter ``name`` at this strength; <lora:name:0.6:0.8>: text encoders, denoiser
    {red|green|3::blue}            one of them by the seed, blue three times as often; {2$$a|b|c}: two of them
    __colour__                     a line of the file colour.txt by the seed
    \( \) \[ \] \{ \} \| \: \< \__ the characters themselves

Unmatched brackets, and braces without a choice in them, are ordinary characters. Scheduled words ([a:b:0.5], [a|b]) and
hypernetworks are refused. Importing does not load torch: pages and commands also read prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from adapters.errors import InputError

STRONGER = 1.1
"""Factor of a pair of round brackets, divisor of a pair of square ones."""

DEEPEST = 50
"""Most levels of nested brackets."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_TOKEN = re.compile(
    r"\\(?P<escaped>BREAK|__|[()\[\]{}|:<\\])"
    r"|<(?P<kind>lora|lyco|hypernet):(?P<tag>[^<>]*)>"
    r"|__(?P<wildcard>[A-Za-z0-9](?:[\w ./-]{0,100}?[A-Za-z0-9])?)__"
    r"|(?P<break>\bBREAK\b)"
    r"|(?P<mark>[()\[\]{}|:])"
)
_STRENGTH = re.compile(rf":\s*({_NUMBER})\s*")
_HOW_MANY = re.compile(r"\s*(\d+)\$\$")
_SHARE = re.compile(r"\s*(\d+\.?\d*|\.\d+)::")
_WHEN = re.compile(rf":\s*{_NUMBER}\s*$")
_PARTNER = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Emphasis:
    """Words with a weight."""

    inner: tuple[Node, ...]
    weight: float


@dataclass(frozen=True)
class Adapter:
    """An adapter named in a prompt: strength in the denoiser, and in the text encoders (None = the same)."""

    name: str
    weight: float = 1.0
    te_weight: float | None = None

    @property
    def strengths(self) -> tuple[float, float]:
        """(strength in the denoiser, strength in the text encoders)."""
        return self.weight, self.weight if self.te_weight is None else self.te_weight


@dataclass(frozen=True)
class Choice:
    """``count`` of the options (share, nodes), drawn in proportion to their shares."""

    options: tuple[tuple[float, tuple[Node, ...]], ...]
    count: int = 1


@dataclass(frozen=True)
class Wildcard:
    """A line of the wildcard file ``name``."""

    name: str


@dataclass(frozen=True)
class Break:
    """The start of a new part."""


Node = str | Emphasis | Adapter | Choice | Wildcard | Break
Lines = Callable[[str], Sequence[str]]
"""Name of a wildcard -> its lines."""


@dataclass(frozen=True)
class Piece:
    """Text with one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt to encode: parts, each of which starts a new chunk, made of pieces."""

    parts: tuple[tuple[Piece, ...], ...]

    @property
    def words(self) -> str:
        """The text without weights and parts."""
        return " ".join("".join(piece.text for piece in part) for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether it is one part with every weight 1."""
        return len(self.parts) == 1 and not self.emphasis

    @property
    def emphasis(self) -> list[tuple[str, float]]:
        """(text, weight) of the pieces whose weight is not 1."""
        return [(piece.text.strip(), piece.weight) for part in self.parts for piece in part if piece.weight != 1]

    def mapped(self, change: Callable[[str], str]) -> Prompt:
        """The prompt with ``change`` applied to the text of every piece."""
        return Prompt(tuple(tuple(Piece(change(piece.text), piece.weight) for piece in part) for part in self.parts))


def literal(text: str) -> Prompt:
    """A prompt of ``text`` taken literally, without any syntax."""
    return Prompt(((Piece(text),),))


def read(text: str) -> Prompt:
    """The words of ``text`` with their weights; adapters are left out.

    Raises:
        InputError: as :func:`parse`, or a choice or wildcard is still open.
    """
    parts: list[list[Piece]] = [[]]
    for piece in _pieces(parse(text), 1.0):
        if piece is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == piece.weight:
            parts[-1][-1] = Piece(parts[-1][-1].text + piece.text, piece.weight)
        else:
            parts[-1].append(piece)
    return Prompt(tuple(tuple(part) or (Piece(""),) for part in parts))


def has_choices(text: str) -> bool:
    """Whether it has choices or wildcards, which the seed decides.

    Raises:
        InputError: as :func:`parse`.
    """
    return any(isinstance(node, Choice | Wildcard) for node in _walk(parse(text)))


def chosen(text: str, seed: int, lines: Lines) -> str:
    """``text`` with every choice made by ``seed``; unchanged if it has none.

    Raises:
        InputError: as :func:`parse`, a wildcard without lines, or one that refers to itself.
    """
    if not has_choices(text):
        return text
    return written(_decided(parse(text), random.Random(f"wildcards {seed}"), lines, ()))


def without_adapters(text: str) -> tuple[str, list[Adapter]]:
    """``text`` without the adapters that it names, and those adapters; the strengths of one named twice are added.

    Raises:
        InputError: as :func:`parse`, or an adapter inside an open choice.
    """
    nodes = parse(text)
    found: dict[str, Adapter] = {}
    for node in _walk(nodes):
        if isinstance(node, Choice) and any(isinstance(part, Adapter) for _, o in node.options for part in _walk(o)):
            raise InputError("An adapter inside {a|b} is unknown until the choice is made: move it out of the braces.")
        if isinstance(node, Adapter):
            known = found.get(node.name)
            found[node.name] = _sum(known, node) if known else node
    return (written(_stripped(nodes)).strip(), list(found.values())) if found else (text, [])


def parse(text: str) -> tuple[Node, ...]:
    """The tree of a prompt.

    Raises:
        InputError: scheduled words, a hypernetwork, an adapter without a name or with a strength that is not a number,
            or brackets nested too deeply.
    """
    tokens = list(_TOKEN.finditer(text))
    ends = _ends(tokens)
    frames = [_Frame("", 0)]
    place, skip = 0, -1
    for number, token in enumerate(tokens):
        if token.start() < skip:
            continue
        frames[-1].add(text[max(place, skip) : token.start()])
        place = token.end()
        if token["escaped"]:
            frames[-1].add(token["escaped"])
        elif token["kind"]:
            frames[-1].nodes.append(_tag(token))
        elif token["wildcard"]:
            frames[-1].nodes.append(Wildcard(token["wildcard"]))
        elif token["break"]:
            frames[-1].nodes.append(Break())
        else:
            skip = max(skip, _mark(text, token, number, ends, frames))
    frames[0].add(text[max(place, skip) :])
    return tuple(frames[0].nodes)


def written(nodes: Sequence[Node], inside: str = "") -> str:
    """The text that :func:`parse` reads as these nodes."""
    return "".join(_written(node, inside) for node in nodes)


class _Frame:
    """A bracket that is open while parsing."""

    def __init__(self, kind: str, start: int) -> None:
        self.kind, self.start = kind, start
        self.nodes: list[Node] = []
        self.options: list[tuple[Node, ...]] = []
        self.weight: float | None = None

    def add(self, text: str) -> None:
        """Append characters."""
        if text and self.nodes and isinstance(self.nodes[-1], str):
            self.nodes[-1] += text
        elif text:
            self.nodes.append(text)


def _ends(tokens: Sequence[re.Match[str]]) -> dict[int, int]:
    """Number of a bracket -> number of its partner, in both directions; unmatched brackets are left out."""
    waiting: list[tuple[str, int]] = []
    open_now = dict.fromkeys(_PARTNER.values(), 0)
    ends: dict[int, int] = {}
    for number, token in enumerate(tokens):
        mark = token["mark"] or ""
        if mark in open_now:
            waiting.append((mark, number))
            open_now[mark] += 1
        elif mark in _PARTNER and open_now[_PARTNER[mark]]:
            while waiting:
                kind, start = waiting.pop()
                open_now[kind] -= 1
                if kind == _PARTNER[mark]:
                    ends[start], ends[number] = number, start
                    break
    return ends


def _mark(text: str, token: re.Match[str], number: int, ends: dict[int, int], frames: list[_Frame]) -> int:
    """Read a bracket, a bar or a colon; returns the position up to which the text is read."""
    mark, top = token["mark"], frames[-1]
    if mark in "([{" and number in ends:
        if len(frames) > DEEPEST:
            raise InputError(f"The prompt has brackets nested more than {DEEPEST} deep.")
        frames.append(_Frame(mark, token.end()))
    elif mark in ")]}" and number in ends:
        frames.pop()
        _close(text, token, top, frames[-1])
    elif mark == "|" and top.kind == "{":
        top.options.append(tuple(top.nodes))
        top.nodes = []
    elif mark == "|" and top.kind == "[":
        raise InputError(_SCHEDULED.format("[a|b]", "{a|b} to choose one by the seed", r"\["))
    elif mark == ":" and top.kind == "(" and (found := _STRENGTH.match(text, token.start())):
        if text[found.end() : found.end() + 1] != ")":
            top.add(mark)
        else:
            top.weight = float(found[1])
            return found.end()
    else:
        top.add(mark)
    return token.end()


_SCHEDULED = (
    "The prompt has words that change over the steps ({}), which are not supported: use {}, or {} for the character."
)


def _close(text: str, token: re.Match[str], frame: _Frame, outer: _Frame) -> None:
    """Append the content of a closed bracket to the one around it."""
    if frame.kind == "(":
        outer.nodes.append(Emphasis(tuple(frame.nodes), STRONGER if frame.weight is None else frame.weight))
    elif frame.kind == "[":
        if _WHEN.search(text, max(frame.start, token.start() - 40), token.start()):
            raise InputError(_SCHEDULED.format("[a:b:0.5]", "one prompt, with a schedule for its adapter", r"\["))
        outer.nodes.append(Emphasis(tuple(frame.nodes), 1 / STRONGER))
    else:
        options = [*frame.options, tuple(frame.nodes)]
        count = _HOW_MANY.match(options[0][0]) if options[0] and isinstance(options[0][0], str) else None
        if len(options) == 1 and count is None:
            outer.add("{")
            for node in frame.nodes:
                if isinstance(node, str):
                    outer.add(node)
                else:
                    outer.nodes.append(node)
            outer.add("}")
            return
        if count is not None:
            options[0] = _cut(options[0], count.end())
        outer.nodes.append(Choice(tuple(map(_option, options)), min(int(count[1]), len(options)) if count else 1))


def _option(nodes: tuple[Node, ...]) -> tuple[float, tuple[Node, ...]]:
    share = _SHARE.match(nodes[0]) if nodes and isinstance(nodes[0], str) else None
    return (float(share[1]), _cut(nodes, share.end())) if share else (1.0, nodes)


def _cut(nodes: tuple[Node, ...], length: int) -> tuple[Node, ...]:
    """``nodes`` without the first ``length`` characters."""
    assert isinstance(nodes[0], str)
    rest = nodes[0][length:]
    return (rest, *nodes[1:]) if rest else nodes[1:]


def _tag(token: re.Match[str]) -> Adapter:
    kind, content = token["kind"], token["tag"]
    if kind == "hypernet":
        raise InputError(f"'{token[0]}' names a hypernetwork, which is not supported: remove it from the prompt.")
    name, *rest = (part.strip() for part in content.split(":"))
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    numbers = [part for part in rest if "=" not in part]
    if not name or len(numbers) > 2 or not set(named) <= {"te", "unet"}:
        raise InputError(f"'{token[0]}' in the prompt is not an adapter: write <lora:name:0.8>.")
    try:
        text = float(named.get("te", numbers[0] if numbers else "1"))
        denoiser = float(named.get("unet", numbers[-1] if numbers else str(text)))
        if not abs(text) + abs(denoiser) < float("inf"):
            raise ValueError
    except ValueError:
        raise InputError(f"'{token[0]}' in the prompt: the strength must be a number, as in <lora:name:0.8>.") from None
    return Adapter(name, denoiser, None if text == denoiser else text)


def _sum(one: Adapter, other: Adapter) -> Adapter:
    weight, text = (first + second for first, second in zip(one.strengths, other.strengths, strict=True))
    return Adapter(one.name, weight, None if text == weight else text)


def _walk(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        if isinstance(node, Emphasis):
            yield from _walk(node.inner)
        elif isinstance(node, Choice):
            for _, option in node.options:
                yield from _walk(option)


def _pieces(nodes: Sequence[Node], weight: float) -> Iterator[Piece | None]:
    """Pieces in order, with None between parts."""
    for node in _stripped(nodes):
        if isinstance(node, str):
            yield Piece(node, weight)
        elif isinstance(node, Emphasis):
            yield from _pieces(node.inner, weight * node.weight)
        elif isinstance(node, Break):
            yield None
        else:
            raise InputError(f"The prompt still has a choice in it: {written([node])}.")


def _stripped(nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` without adapters, and without the doubled space or comma that they leave."""
    kept: list[Node] = []
    gap = False
    for node in nodes:
        if isinstance(node, Adapter):
            gap = True
            continue
        if isinstance(node, Emphasis):
            node = Emphasis(tuple(_stripped(node.inner)), node.weight)
        before = kept[-1] if kept else None
        if gap and isinstance(node, str) and isinstance(before, str):
            if before.rstrip().endswith(",") and node.lstrip().startswith(","):
                node = node.lstrip()[1:]
            joint = node.lstrip() if before[-1:].isspace() else node
            kept[-1] = before + joint
        else:
            kept.append(node)
        gap = False
    return kept


def _decided(nodes: Sequence[Node], draw: random.Random, lines: Lines, within: tuple[str, ...]) -> list[Node]:
    made: list[Node] = []
    for node in nodes:
        if isinstance(node, Emphasis):
            made.append(Emphasis(tuple(_decided(node.inner, draw, lines, within)), node.weight))
        elif isinstance(node, Choice):
            for number, option in enumerate(_drawn(node, draw)):
                made += [*([", "] if number else []), *_decided(option, draw, lines, within)]
        elif isinstance(node, Wildcard):
            if node.name in within:
                raise InputError(f"The wildcard __{node.name}__ refers to itself: {' > '.join((*within, node.name))}.")
            line = draw.choice(lines(node.name))
            made += _decided(parse(line), draw, lines, (*within, node.name))
        else:
            made.append(node)
    return made


def _drawn(choice: Choice, draw: random.Random) -> list[tuple[Node, ...]]:
    """``count`` different options, in the order in which they are drawn."""
    left = list(choice.options)
    made = []
    for _ in range(choice.count):
        shares = [share for share, _ in left]
        number = draw.choices(range(len(left)), shares if sum(shares) > 0 else None)[0]
        made.append(left.pop(number)[1])
    return made


def _written(node: Node, inside: str) -> str:
    if isinstance(node, str):
        marks = r"[()\[\]{}\\|:]" if inside else r"[()\[\]{}\\|]"
        text = re.sub(marks, lambda found: "\\" + found[0], node)
        text = re.sub(r"<(?=(lora|lyco|hypernet):)|__|\bBREAK\b|<(?=(lora|lyco|hypernet)\\:)", r"\\\g<0>", text)
        return text
    if isinstance(node, Emphasis):
        return f"({written(node.inner, '(')}:{node.weight!r})"
    if isinstance(node, Adapter):
        both = f"{node.te_weight!r}:{node.weight!r}" if node.te_weight is not None else repr(node.weight)
        return f"<lora:{node.name}:{both}>"
    if isinstance(node, Wildcard):
        return f"__{node.name}__"
    if isinstance(node, Break):
        return "BREAK"
    head = f"{node.count}$$" if node.count != 1 or len(node.options) == 1 else ""
    options = [(f"{share!r}::" if share != 1 else "") + written(inner, "{") for share, inner in node.options]
    return "{" + head + "|".join(options) + "}"


__all__ = [
    "Adapter", "Break", "Choice", "Emphasis", "Node", "Piece", "Prompt", "Wildcard", "chosen", "has_choices",
    "literal", "parse", "read", "without_adapters", "written",
]  # fmt: skip
