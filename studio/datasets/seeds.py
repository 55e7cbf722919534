"""Random numbers that depend on where they are used, not on earlier draws.

Every stream (data, noise, times, ...) and every sample has its own seed, a hash of the run's seed. So a resumed run, a
run that draws samples and a run on another number of processes get the same numbers, and accumulating four batches of 8
equals a batch of 32.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed for number ``index`` of ``stream``."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(seed: int, stream: str, index: int = 0) -> random.Random:
    """Python generator of a stream."""
    return random.Random(derive(seed, stream, index))


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """Torch generator (CPU) of a stream."""
    import torch

    return torch.Generator().manual_seed(derive(seed, stream, index))


def normal(seed: int, stream: str, samples: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal numbers ``(len(samples), *shape)``, row i drawn for sample number ``samples[i]``."""
    import torch

    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, stream, n)) for n in samples])


def uniform(seed: int, stream: str, samples: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1) ``(len(samples),)``."""
    import torch

    return torch.tensor([rng(seed, stream, n).random() for n in samples])


@contextmanager
def global_seed(seed: int, stream: str, index: int = 0) -> Iterator[None]:
    """Inside, torch's global generators start at the stream; afterwards they are as before."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, stream, index))
        yield
