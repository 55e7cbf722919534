"""The library with any file in it: everything still lists, within a time limit, and what is odd says why."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapters.errors import InputError
from adapters.formats import read
from pipelines.geometry.checkpoints import open_checkpoint
from studio import library
from studio import settings as places
from studio.cli.app import run as command
from studio.library import scan
from studio.printable import printable
from tests.studio.files import BLOCK, diffusers_lora, kohya_lora, peft_lora

LIMIT = 2.0
"""Seconds of the processor for one file, listed and read."""

ANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

KEY = f"unet.{BLOCK}.attn2.to_k"


@pytest.fixture
def shelf() -> Path:
    """The library's own folder for adapters."""
    return places.adapter_folders()[0]


def raw(path: Path, head: Any, data: bytes = b"") -> Path:
    """A safetensors file with this head, whatever it says."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def small(path: Path, names: list[str] | None = None, **metadata: Any) -> Path:
    """Two good layers, further empty tensors, and metadata as it is given."""
    tensors = {f"{KEY}.lora_A.weight": [2, 3], f"{KEY}.lora_B.weight": [4, 2]}
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head |= {name: {"dtype": "F32", "shape": [0], "data_offsets": [offset, offset]} for name in names or ()}
    return raw(path, head, np.ones(offset // 4, "f4").tobytes())


def listed(name: str) -> library.Record:
    """The record, found within the limit, everything of it writable as JSON and to a terminal."""
    start = time.process_time()
    record = next(record for record in library.adapters() if record.name == name)
    assert time.process_time() - start < LIMIT
    json.dumps(record.as_json(), ensure_ascii=False).encode("utf-8")
    assert "unexpected" not in record.problem
    return record


def try_to_read(path: Path) -> None:
    """Reading ends in time, with an adapter or the error that says why not."""
    start = time.process_time()
    with suppress(InputError):
        read(path)
    assert time.process_time() - start < LIMIT


NESTED = "[" * 500 + "]" * 500

ODD_TEXT: dict[str, dict[str, str]] = {
    "recipe of text": {"adapter_studio_recipe": '{"base": "x", "data": [1], "config": 7}'},
    "recipe of a list": {"adapter_studio_recipe": "[1, 2]"},
    "recipe too deep": {"adapter_studio_recipe": '{"base": ' + NESTED + "}"},
    "recipe beyond Python": {"adapter_studio_recipe": "[" * 100_000},
    "recipe not finite": {"adapter_studio_recipe": '{"base": {"name": NaN}, "x": 1e999}'},
    "recipe of half letters": {"adapter_studio_recipe": '{"base": {"name": "\\ud800"}, "triggers": ["\\udcff"]}'},
    "words null": {"adapter_studio_words": "null"},
    "words deep": {"adapter_studio_words": '{"a":' * 900 + "1" + "}" * 900},
    "words of tables": {"adapter_studio_words": '[{"a": 1}, [2], "toy"]'},
    "config deep": {"lora_adapter_metadata": NESTED},
    "config of a list": {"lora_adapter_metadata": "[]"},
    "config of numbers": {"lora_adapter_metadata": '{"unet.r": {}, "unet.lora_alpha": [[]], "unet.alpha_pattern": 3}'},
    "embedding elsewhere": {"w_embedding": "../../a\x00b", "w_ref": "x"},
    "letters": {"modelspec.trigger_phrase": "a\x1b[31mb\u202ec\n", "modelspec.architecture": "x" * 200_000},
}


@pytest.mark.parametrize("name", ODD_TEXT)
def test_text_of_any_kind_and_depth(shelf: Path, name: str) -> None:
    path = small(shelf / "odd.safetensors", **ODD_TEXT[name])
    good = diffusers_lora(shelf / "good.safetensors")
    assert not listed("odd").problem
    assert not listed("good").problem
    try_to_read(path)
    read(good)


@pytest.mark.parametrize("value", [5, None, ["x"], {"a": {}}, True])
def test_metadata_that_is_no_text_is_said(shelf: Path, value: Any) -> None:
    path = small(shelf / "odd.safetensors", note=value)
    assert listed("odd").problem == "its metadata is not all text"
    try_to_read(path)


@pytest.mark.parametrize(
    "name",
    ["x" * 50_000, "lora_unet_" * 5_000, "a_lora." * 8_000, "._" * 25_000 + "lora_down.weight", "img_attn_" * 6_000,
     "attn2_to_" * 5_000, "unet." + "a." * 20_000 + "lora_A.weight", "base_model.model." * 3_000],
    ids=lambda name: name[:12],
)  # fmt: skip
def test_names_of_fifty_thousand_letters(shelf: Path, name: str) -> None:
    path = small(shelf / "odd.safetensors", [name])
    assert "has a name of" in listed("odd").problem
    try_to_read(path)


@pytest.mark.parametrize("part", ["img_attn_", "lora_unet_", "_lora.down", "._", "attn2.to_", "+*(", "to_out_0"])
def test_many_names_as_long_as_they_may_be(shelf: Path, part: str) -> None:
    names = [f"{(part * 1000)[:940]}{number}.lora_A.weight" for number in range(2000)]
    path = small(shelf / "odd.safetensors", names)
    listed("odd")
    try_to_read(path)


def test_a_hundred_thousand_tensors(shelf: Path) -> None:
    modules = [f"lora_unet_down_blocks_{number}_attn1_to_q" for number in range(50_000)]
    names = [f"{module}.lora_{side}.weight" for module in modules for side in ("up", "down")]
    small(shelf / "many.safetensors", names)
    start = time.process_time()
    record = next(record for record in library.adapters() if record.name == "many")
    assert time.process_time() - start < 20
    assert record.notes["layers"]
    start = time.process_time()
    library.adapters()
    assert time.process_time() - start < 5, "the second time it is remembered"


def test_pipes_links_in_circles_and_folders_that_pretend(shelf: Path) -> None:
    os.mkfifo(shelf / "pipe.safetensors")
    (shelf / "peft").mkdir()
    (shelf / "peft" / "adapter_config.json").write_text("{}")
    os.mkfifo(shelf / "peft" / "adapter_model.safetensors")
    (shelf / "cards").mkdir()
    diffusers_lora(shelf / "cards" / "a.safetensors")
    os.mkfifo(shelf / "cards" / "card.md")
    (shelf / "circle").mkdir()
    diffusers_lora(shelf / "circle" / "one.safetensors")
    diffusers_lora(shelf / "circle" / "two.safetensors")
    (shelf / "circle" / "again").symlink_to(shelf / "circle", target_is_directory=True)
    (shelf / "up").symlink_to(shelf, target_is_directory=True)
    (shelf / "nowhere.safetensors").symlink_to(shelf / "not-there")
    (shelf / "itself.safetensors").symlink_to(shelf / "itself.safetensors")
    (shelf / "folder.safetensors").mkdir()
    names = [record.name for record in library.adapters() if record.source == "library"]
    assert names == ["cards", "one", "peft", "two"]
    assert library.find("peft").problem == "not a file"
    for path in shelf.iterdir():
        try_to_read(path)


def test_linked_folders_are_followed_once(shelf: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    diffusers_lora(elsewhere / "far.safetensors")
    diffusers_lora(elsewhere / "away.safetensors")
    (shelf / "link").symlink_to(elsewhere, target_is_directory=True)
    (shelf / "link2").symlink_to(elsewhere, target_is_directory=True)
    assert [record.name for record in library.adapters() if record.source == "library"] == ["away", "far"]


@pytest.mark.parametrize("card", [
    "---\ntriggers: &a [*a]\n---\n", "---\nlicense: {a: [1, {2: 3}]}\ntriggers: [[x], {y: z}, 2020-01-01, .nan]\n---\n",
    "---\n" + "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    ) + "triggers: *m\n---\n",
    "---\n" + "[" * 5000 + "\n---\n",
    "---\nx: !!python/object:os.system {}\n---\n", "---\n- 1\n---\n", "\ufeff---\n---\n",
])  # fmt: skip
def test_cards_of_any_kind(shelf: Path, card: str) -> None:
    diffusers_lora(shelf / "odd.safetensors")
    (shelf / "odd.md").write_text(card, encoding="utf-8")
    assert not listed("odd").problem


def test_names_that_are_not_utf8(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They list, read, hash and rename; the end of a training is not their business."""
    from studio.library import adopt
    from studio.training.schemas.image import TrainImageConfig

    odd = Path(os.fsdecode(os.fsencode(shelf) + b"/caf\xe9\xff.safetensors"))
    odd.write_bytes(diffusers_lora(tmp_path / "x.safetensors").read_bytes())
    hidden = Path(os.fsdecode(os.fsencode(shelf) + b"/d\xfc/"))
    hidden.mkdir()
    diffusers_lora(hidden / "inside.safetensors")
    diffusers_lora(hidden / "beside.safetensors")
    record = listed(r"caf\xe9\xff")
    assert not record.problem
    assert record.path == odd
    assert library.sha256(odd) == library.show(record.name).sha256
    assert library.resolve_adapter(record.name) == odd
    assert listed("inside").path == hidden / "inside.safetensors"
    for arguments in (["list"], ["show", record.name], ["scan"], ["list", "--json"], ["show", record.name, "--json"]):
        assert command(["library", *arguments]) == 0
        assert r"caf\xe9\xff" in capsys.readouterr().out.replace("\\\\", "\\") or arguments == ["scan"]
    made = diffusers_lora(tmp_path / "made.safetensors")
    result = adopt.trained(TrainImageConfig.model_construct(name="made"), {"adapter": str(made)})
    assert result["library"] == "made"
    renamed = library.rename(record.name, "coffee")
    assert renamed.path == shelf / "coffee.safetensors"


def test_names_that_would_act_in_a_terminal_are_shown_escaped(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31mred\u202egnp\nline\r\x07"
    diffusers_lora(shelf / f"{name}.safetensors", **{"modelspec.trigger_phrase": "x\x1b]0;title\x07y"})
    shown = r"a\x1b[31mred\u202egnp\x0aline\x0d\x07"
    for arguments in (["library", "list"], ["library", "show", name], ["lora", "inspect", name]):
        assert command(arguments) == 0
        out = capsys.readouterr().out
        assert shown in out.replace("\n", "")
        assert not set(out) & set("\x1b\u202e\r\x07")
    assert command(["library", "show", name + "x"]) == 2
    error = capsys.readouterr().err
    assert r"a\x1b[31mred\u202egnp line \x07" in error
    assert not set(error) & set("\x1b\u202e\r\x07")


@pytest.mark.parametrize(
    ("text", "lines", "wanted"),
    [("plain é 狐 🦊", False, "plain é 狐 🦊"), ("a\nb\tc", False, r"a\x0ab\x09c"), ("a\nb\tc\r", True, "a\nb\tc\\x0d"),
     ("\udce9\ud800", False, r"\xe9\ud800"), ("\u202e\u2066\u200f\ufeff", False, r"\u202e\u2066\u200f\ufeff")],
)  # fmt: skip
def test_printable(text: str, lines: bool, wanted: str) -> None:
    assert printable(text, lines) == wanted


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.sampled_from([
    "unet.", "base_model.model.", "lora_unet_", "diffusion_model.", "bundle_emb.", "double_blocks.0.", "attn1", "to_q",
    ".lora_A.weight", ".lora_B.weight", ".alpha", ".hada_w1_a", ".lokr_w1", ".dora_scale", ".diff", ".oft_", "é",
    "\x00", "\ud800", " ", "\n",
])  # fmt: skip
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("".join)


@ANY
@given(
    names=st.lists(NAMES, max_size=6, unique=True),
    shapes=st.lists(st.lists(st.integers(-1, 4), max_size=4), min_size=6, max_size=6),
    kinds=st.lists(st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "BOOL", "nothing"]), min_size=6, max_size=6),
    metadata=st.none() | st.dictionaries(
        st.sampled_from(["adapter_studio_recipe", "adapter_studio_words", "lora_adapter_metadata", "w_embedding", "x"]),
        VALUES.map(json.dumps) | VALUES,
    ),
)  # fmt: skip
def test_any_head_lists_and_reads_in_time(
    tmp_path: Path, names: list[str], shapes: list[list[int]], kinds: list[str], metadata: Any
) -> None:
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, shape, kind in zip(names, shapes, kinds, strict=False):
        size = abs(int(np.prod(shape))) * {"F16": 2, "F32": 4}.get(kind, 1)
        head[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    path = raw(tmp_path / "odd.safetensors", head, bytes(range(256)) * (offset // 256) + bytes(offset % 256))
    start = time.process_time()
    record = scan.record(path, "adapter")
    json.dumps(record.as_json(), ensure_ascii=False).encode("utf-8")
    assert time.process_time() - start < LIMIT
    assert "unexpected" not in record.problem
    try_to_read(path)


@ANY
@given(data=st.data())
def test_a_byte_changed_anywhere_lists_and_reads_in_time(tmp_path: Path, data: st.DataObject) -> None:
    make = data.draw(st.sampled_from([diffusers_lora, kohya_lora]))
    path: Any = make(tmp_path / "odd.safetensors", rank=1, width=4)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 1200) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    record = scan.record(path, "adapter")
    assert "unexpected" not in record.problem
    json.dumps(record.as_json(), ensure_ascii=False).encode("utf-8")
    try_to_read(path)


@ANY
@given(config=VALUES | st.dictionaries(st.sampled_from(["peft_type", "r", "lora_alpha", "alpha_pattern", "bias",
                                                        "rank_pattern", "init_lora_weights", "use_dora", "more"]),
                                       VALUES, max_size=5))  # fmt: skip
def test_any_configuration_of_peft_lists_and_reads_in_time(tmp_path: Path, config: Any) -> None:
    folder = tmp_path / "peft"
    if not folder.exists():
        peft_lora(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert not scan.record(folder, "adapter").problem
    try_to_read(folder)


def test_compressed_pickles_are_refused_before_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    import torch

    plain = tmp_path / "plain.pt"
    torch.save({f"{KEY}.lora_A.weight": torch.zeros(2, 100_000)}, plain)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was opened"))
    with pytest.raises(InputError, match="compressed archive"):
        read(packed)
    with pytest.raises(InputError, match="compressed archive"):
        open_checkpoint(packed)


@pytest.mark.parametrize(("size", "fits"), [(1e18, True), (1e20, False)])
def test_products_that_are_not_finite_are_refused(tmp_path: Path, size: float, fits: bool) -> None:
    tensors = {f"{KEY}.lora_A.weight": np.full((2, 3), size, "f4"), f"{KEY}.lora_B.weight": np.full((4, 2), size, "f4")}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    if fits:
        read(path)
    else:
        with pytest.raises(InputError, match="so large that their product overflows"):
            read(path)
