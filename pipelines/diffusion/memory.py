"""Memory presets, built on diffusers' own options.

none       everything stays on the device.
balanced   whole models move to the accelerator when needed; the autoencoder decodes one picture at a time. Same
           arithmetic, same pictures.
low        single layers move instead (group offload), large pictures are also decoded in tiles, and the denoiser's
           weights are stored in 8 bits (float8_e4m3, computed in the chosen precision): pictures change slightly.

Without an accelerator nothing moves; the rest works the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from adapters.errors import InputError

PRESETS = ("none", "balanced", "low")


def apply_preset(
    pipe: Any, preset: str, denoisers: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Apply a preset to ``pipe`` and place it on ``device``; returns what was done, as short phrases.

    Args:
        denoisers: attributes of the denoisers in ``pipe``.
        dtype: compute precision.

    Raises:
        InputError: an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"Unknown memory preset '{preset}': use one of {', '.join(PRESETS)}.")
    accelerator = device.type not in ("cpu", "meta")
    if preset == "none":
        pipe.to(device)
        return []
    done = []
    pipe.vae.enable_slicing()
    done.append("pictures decoded one by one")
    if preset == "balanced":
        if accelerator:
            pipe.enable_model_cpu_offload(device=device)
            done.append("models moved to the accelerator one at a time")
        else:
            pipe.to(device)
        return done
    pipe.vae.enable_tiling()
    for denoiser in denoisers:
        getattr(pipe, denoiser).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    done += ["large pictures decoded in tiles", "denoiser stored in 8 bits (changes pictures slightly)"]
    if accelerator:
        pipe.enable_group_offload(
            onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
        )
        done.append("layers moved to the accelerator one at a time")
    else:
        pipe.to(device)
    return done


def free(device: torch.device) -> int:
    """Free bytes on a device; in a container, within its limit."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "mem_get_info"):
        kept = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + kept)
    found = int(psutil.virtual_memory().available)
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        place = Path("/sys/fs/cgroup") / folder
        try:
            most, now = (int((place / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        found = min(found, most - now + int(stat.get("inactive_file", 0)))  # cached files can be evicted
    return found
