"""Keeps the model libraries' own warnings and progress bars, which mean nothing to the user, out of the terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any


def library_warnings() -> None:
    """Silence advice, deprecations and notes on optional kernels (unless ``ADAPTER_STUDIO_DEBUG`` is set).

    Call it before importing the libraries.
    """
    if os.environ.get("ADAPTER_STUDIO_DEBUG"):
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def loading_bars() -> None:
    """No progress bars for loading local files; downloads keep theirs."""
    import diffusers
    import transformers
    from huggingface_hub import utils as hub

    for library_logging in (diffusers.utils.logging, transformers.utils.logging):
        library_logging.disable_progress_bar()
    hub.enable_progress_bars()  # type: ignore[attr-defined]


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, nobody's bar of tqdm is drawn (unless ``ADAPTER_STUDIO_DEBUG`` is set)."""
    from tqdm.std import tqdm

    kind: Any = tqdm
    plain = kind.__init__
    if not os.environ.get("ADAPTER_STUDIO_DEBUG"):
        kind.__init__ = partialmethod(plain, disable=True)
    try:
        yield
    finally:
        kind.__init__ = plain
