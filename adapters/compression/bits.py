"""Small whole numbers packed into bytes, as a stream of bits: number i occupies bits i b to (i + 1) b - 1."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes`` (n,) of 0 .. 2^bits - 1, 1 to 8 bits each, as ceil(n bits / 8) bytes (uint8)."""
    if bits == 8:
        return codes.to(torch.uint8)
    count = codes.numel()
    rows = torch.zeros(-(-count // 8) * 8, dtype=torch.int64, device=codes.device)
    rows[:count] = codes
    places = torch.arange(8, device=codes.device) * bits
    words = (rows.view(-1, 8) << places).sum(1)  # eight numbers are ``bits`` bytes
    octets = (words[:, None] >> (8 * torch.arange(bits, device=codes.device))) & 255
    return octets.flatten()[: packed_bytes(count, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` numbers of :func:`pack`, int64 (uint8 for 8 bits)."""
    if bits == 8:
        return packed[:count]
    octets = torch.zeros(-(-count // 8) * bits, dtype=torch.int64, device=packed.device)
    octets[: packed.numel()] = packed
    words = (octets.view(-1, bits) << (8 * torch.arange(bits, device=packed.device))).sum(1)
    codes = (words[:, None] >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.flatten()[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed numbers."""
    return -(-count * bits // 8)
