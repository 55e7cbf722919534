"""The whole suite takes the machine's cores; a part of it runs plainly."""

from __future__ import annotations

import os

import pytest

WHOLE = ("not slow and not journey", "journey")
"""Markers of runs over everything: the default's (in pyproject.toml), and what CI runs beside it."""

MOST = 4
"""Processes at most: each loads torch and its own small models."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let ``pytest`` and ``pytest -m journey`` use several processes, a file's tests in one; ``-n 0`` turns that off.

    Tests compute with one thread each, so that two cores do twice as much.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr in WHOLE
    asked = getattr(config.option, "numprocesses", 0)  # None: nothing was said; 0 also without pytest-xdist
    alone = hasattr(config, "workerinput") or config.option.usepdb or config.option.collectonly
    if whole and asked is None and not alone:
        config.option.numprocesses = max(1, min(MOST, os.cpu_count() or 1))
        config.option.dist = "loadfile"
