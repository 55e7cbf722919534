"""Errors on the pages: a user's mistake is one sentence, ours is a short apology and a line in the log."""

from __future__ import annotations

import functools
import html
import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from adapters.errors import StudioError

log = logging.getLogger("adapter-studio.ui")


def say(sentence: str, title: str = "Not yet") -> None:
    """Show one sentence in a corner of the page."""
    gr.Warning(html.escape(sentence), title=title, duration=12)


def errors_shown(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show the errors of ``handler`` as sentences and leave the page as it was."""

    @functools.wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except StudioError as error:
            say(str(error))
        except gr.Error:
            raise
        except Exception:
            log.exception("%s failed", handler.__qualname__)
            say("Something went wrong on our side. Details are in the program's log.", title="Sorry")
        return gr.skip()

    return guarded
