"""Small helpers shared by the build programs: folders, JSON, devices, averages, learning rates."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_dir() -> Path:
    """Return (and create) the folder of intermediate files.

    ``ADAPTER_STUDIO_BUILD`` overrides the default ``~/.cache/adapter-studio/build``.
    """
    root = Path(os.environ.get("ADAPTER_STUDIO_BUILD") or Path.home() / ".cache/adapter-studio/build")
    root.mkdir(parents=True, exist_ok=True)
    return root


def from_home(path: Path) -> str:
    """Return the path with the home folder as ``~``, so that recipes name nobody's machine."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else path.as_posix()


def write_json(target: Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically."""
    return files.write_text(target, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def pick_device(name: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device (``auto``: a GPU if there is one)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: str) -> Iterator[None]:
    """Run the body in mixed precision; ``dtype`` is a key of :data:`DTYPES`, ``fp32`` does nothing."""
    if dtype == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=DTYPES[dtype]):
        yield


class Average:
    """Exponential moving average of a module's parameters, kept in fp32, with a warmed-up decay.

    At update ``n`` (from 0) the decay is ``min(limit, (1 + n) / (10 + n))``, so that a short run is
    not dominated by the random start.
    """

    def __init__(self, module: nn.Module, limit: float = 0.999) -> None:
        self.limit = limit
        self.updates = 0
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    def decay(self) -> float:
        """Return the decay of the next update."""
        return min(self.limit, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters."""
        weight = 1 - self.decay()
        values = list(self.values.values())
        now = [p.detach().float() for _, p in module.named_parameters()]
        torch._foreach_lerp_(values, now, weight)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters by the averages (same names, any dtype and device)."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name].to(parameter))

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` needs."""
        return {"updates": self.updates, "values": self.values}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`. Raises ``KeyError`` when a parameter is missing."""
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            value.copy_(state["values"][name])


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradients to a global norm of ``limit`` and return the norm before clipping."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)


class Both(torch.optim.Optimizer):
    """Muon for the matrices inside a network and AdamW for everything else, as one optimizer.

    Muon (Jordan 2024) makes every step of a matrix orthogonal; scaled as by Liu et al. 2025 (arXiv 2502.16982) it takes
    AdamW's learning rates.

    Args:
        model: whose parameters learn.
        inside: says by name and values which of them are such matrices.
        decay: weight decay of Muon's part; AdamW's has none.
    """

    def __init__(
        self, model: nn.Module, inside: Callable[[str, Tensor], bool], decay: float = 0.01, fused: bool | None = True
    ) -> None:
        named = list(model.named_parameters())
        chosen = [p for n, p in named if p.ndim == 2 and inside(n, p)]
        known = {id(p) for p in chosen}
        rest = [p for _, p in named if id(p) not in known]
        muon = torch.optim.Muon(chosen, lr=0.0, weight_decay=decay, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        """Make both steps."""
        for part in self.parts:
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts for group in part.param_groups]
