"""Work in a process of its own, so that the web app and quick commands never load torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from adapters.errors import InputError

T = TypeVar("T")


def apart(function: Callable[..., T], *args: Any) -> T:
    """The result of ``function``, called in a new process; all that goes in and out must be picklable.

    Raises:
        InputError: the process ended early; and whatever the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_quiet, function, *args).result()
        except BrokenProcessPool:
            raise InputError(
                "The process that computes this ended early: there was probably too little memory."
            ) from None


def _quiet(function: Callable[..., T], *args: Any) -> T:
    from studio import silence

    silence.library_warnings()
    silence.loading_bars()
    return function(*args)
