"""Damaged and hostile files: always one clear refusal, or a load that is sound; no crash, no hang, no silent load.

Every case is made from a seed: a file as some program writes it, then one kind of damage. Damage that makes the file
wrong must be refused; damage that may leave a sound file (a flipped bit of a weight) may also load.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from adapters.errors import InputError
from adapters.formats import read
from adapters.formats.fit import fit
from tests.adapters.test_formats import Toy

LONGEST = 5.0  # seconds, on a busy machine; a hang is far beyond it
MODULES = {"down_blocks.0.attn1.to_q": (4, 6), "down_blocks.0.attn1.to_out.0": (6, 4), "down_blocks.0.proj": (6, 5)}


def good(kind: str, random: random.Random) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A sound file of one kind."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for module, (out, inside) in MODULES.items():
        flat = "lora_unet_" + module.replace(".", "_")
        A, B = torch.randn(2, inside, generator=generator), torch.randn(out, 2, generator=generator)
        if kind == "kohya":
            tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(1.0)}
        elif kind == "loha":
            tensors |= {f"{flat}.hada_w1_a": B, f"{flat}.hada_w1_b": A}
            tensors |= {f"{flat}.hada_w2_a": B + 1, f"{flat}.hada_w2_b": A + 1}
        elif kind == "lokr":
            tensors |= {f"{flat}.lokr_w1": torch.randn(1, 1, generator=generator)}
            tensors |= {f"{flat}.lokr_w2_a": B, f"{flat}.lokr_w2_b": A, f"{flat}.alpha": torch.tensor(2.0)}
        else:
            tensors |= {f"unet.{module}.lora_A.weight": A, f"unet.{module}.lora_B.weight": B}
    if kind == "diffusers":
        config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 3}}
        metadata["lora_adapter_metadata"] = json.dumps(config)
    return tensors, metadata


def rewritten(data: bytes, change: Callable[[dict[str, dict[str, object]]], None]) -> bytes:
    """The file with another head."""
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    change(head)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


Damage = Callable[[dict[str, Tensor], dict[str, str], random.Random], bytes]


def cut_off(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    data = save(tensors, metadata or None)
    return data[: random.randrange(len(data))]


def not_finite(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    tensor = tensors[random.choice(sorted(tensors))]
    tensor.view(-1)[random.randrange(tensor.numel())] = random.choice([float("nan"), float("inf"), -float("inf")])
    return save(tensors, metadata or None)


def wrong_shape(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    name = random.choice([key for key in sorted(tensors) if not key.endswith("alpha")])
    shape = list(tensors[name].shape)
    axis = random.randrange(len(shape))
    shape[axis] += random.choice([1, 2, 5])
    tensors[name] = torch.ones(shape)
    return save(tensors, metadata or None)


def odd_dimensions(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    name = random.choice([key for key in sorted(tensors) if not key.endswith("alpha")])
    tensors[name] = torch.ones(random.choice([(), (0,), (2, 0), (2,), (1, 2, 3), (1, 2, 3, 4, 5)]))
    return save(tensors, metadata or None)


def odd_type(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    name = random.choice([key for key in sorted(tensors) if not key.endswith("alpha")])
    kind = random.choice([torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64])
    tensors[name] = torch.ones(tensors[name].shape).to(kind)
    return save(tensors, metadata or None)


def missing_part(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    del tensors[random.choice([key for key in sorted(tensors) if not key.endswith("alpha")])]
    return save(tensors, metadata or None)


def other_name(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    name = random.choice(sorted(tensors))
    tensors[random.choice(["x.", "", "лора", "unet."]) + name + random.choice(["x", ".y", "\0", " "])] = tensors.pop(
        name
    )
    return save(tensors, metadata or None)


def huge_size(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    def change(head: dict[str, dict[str, object]]) -> None:
        entry = head[random.choice([key for key in sorted(head) if key != "__metadata__"])]
        if random.random() < 0.5:
            entry["shape"] = [random.choice([2**31, 2**40, 2**62, 2**64, -1]), 6]
        else:
            entry["data_offsets"] = [0, random.choice([2**31, 2**62, 2**64 - 1])]

    return rewritten(save(tensors, metadata or None), change)


def huge_head(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    data = save(tensors, metadata or None)
    return struct.pack("<Q", random.choice([2**20, 2**32, 2**63, 2**64 - 1])) + data[8:]


def huge_kronecker(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    """Small factors of an enormous matrix."""
    name = "lora_unet_down_blocks_0_attn1_to_q"
    side = random.choice([5000, 20_000])
    return save({f"{name}.lokr_w1": torch.ones(side, 2), f"{name}.lokr_w2": torch.ones(side, 3)})


def bad_configuration(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    tensors, _ = good("diffusers", random)
    flat = {"unet.r": 2, "unet.lora_alpha": 4}
    text = random.choice(
        [
            "{", "[]", "1", "[" * 100_000, '{"unet.lora_alpha": 1e999}',
            json.dumps(flat | {"unet.lora_alpha": random.choice(["x", None, [1], {"a": 1}, True])}),
            json.dumps(flat | {"unet.alpha_pattern": random.choice(["x", [1], {"(": 1}, {"(a+)+b": 1}])}),
            json.dumps(flat | {"unet.alpha_pattern": {"to_q": "x"}}),
            json.dumps(flat | {"unet.peft_type": random.choice(["VERA", 3, "OFT"])}),
        ]
    )  # fmt: skip
    return save(tensors, {"lora_adapter_metadata": text})


def flipped_bits(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    data = bytearray(save(tensors, metadata or None))
    start = random.choice([0, 8 + struct.unpack("<Q", data[:8])[0]])  # anywhere, or in the weights
    for _ in range(random.choice([1, 3, 30])):
        data[random.randrange(start, len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def noise(tensors: dict[str, Tensor], metadata: dict[str, str], random: random.Random) -> bytes:
    return random.randbytes(random.choice([0, 1, 8, 100, 5000]))


MUST_REFUSE: tuple[Damage, ...] = (
    cut_off, not_finite, wrong_shape, odd_dimensions, odd_type, missing_part, other_name, huge_size, huge_head,
    huge_kronecker, bad_configuration, noise,
)  # fmt: skip
MAY_LOAD: tuple[Damage, ...] = (flipped_bits,)
KINDS = ("kohya", "diffusers", "loha", "lokr")


def check_case(seed: int, folder: Path) -> bool:
    """Make and open case ``seed``; True if it loaded."""
    source = random.Random(seed)
    damages = MUST_REFUSE + MAY_LOAD
    damage, kind = damages[seed % len(damages)], source.choice(KINDS)
    data = damage(*good(kind, source), source)
    path = folder / source.choice(["a.safetensors", "a.safetensors", "a.safetensors", "a.pt", "a.bin"])
    path.write_bytes(data)
    what = f"case {seed}: {damage.__name__} of {kind}, {path.name}"
    begun = time.perf_counter()
    try:
        file = fit(read(path), {"unet": Toy()})
    except InputError:
        return False
    except Exception as error:
        raise AssertionError(f"{what} crashed") from error
    finally:
        path.unlink()
        assert time.perf_counter() - begun < LONGEST, f"{what} took too long"
    assert damage in MAY_LOAD, f"{what} was loaded silently"
    assert file.counts()["unet"] >= 1
    for _, module, layer in file.layers():
        assert bool(torch.isfinite(layer.A).all() and torch.isfinite(layer.B).all()), what
        assert layer.delta().flatten(1).shape == (MODULES[module][0], MODULES[module][1]), what
    return True


def test_damaged_files_are_refused_or_sound(tmp_path: Path) -> None:
    loaded = [check_case(seed, tmp_path) for seed in range(208)]
    assert any(loaded)


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    loaded = [check_case(seed, tmp_path) for seed in range(1000, 11_000)]
    assert 0 < sum(loaded) < 1000


def test_undamaged_files_load(tmp_path: Path) -> None:
    for kind in KINDS:
        tensors, metadata = good(kind, random.Random(0))
        (tmp_path / "a.safetensors").write_bytes(save(tensors, metadata or None))
        assert fit(read(tmp_path / "a.safetensors"), {"unet": Toy()}).counts() == {"unet": 3}
