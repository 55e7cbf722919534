"""The precision in which a base is trained or used."""

from __future__ import annotations

import torch

from adapters.errors import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen weights; ``auto`` is fp32 on CPU, fp16 on CUDA GPUs without bf16, else bf16.

    Raises:
        InputError: fp16 on CPU.
    """
    if dtype == "fp16" and device.type == "cpu":
        raise InputError("fp16 needs a GPU: set dtype to fp32 or bf16.")
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16
