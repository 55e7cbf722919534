"""The chat process's client: starts it at the first question, so that the web app itself never loads a model."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

from adapters.errors import InputError
from studio import settings
from studio.conversation import Question

Event = dict[str, Any]


class Client:
    """One chat process, which answers one question at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._busy = threading.Lock()

    def ask(self, question: Question) -> Generator[Event, None, None]:
        """The events of an answer (see :mod:`studio.conversation.session`); closing the iterator stops the model.

        Raises:
            InputError: another answer is under way, or the process reports an error.
        """
        if not self._busy.acquire(blocking=False):
            raise InputError("An answer is being written already: wait for it, or stop it.")
        try:
            yield from self._exchange(question)
        finally:
            self._busy.release()

    def stop(self) -> None:
        """Stop the answer under way."""
        if self._process is not None and self._process.poll() is None:
            self._send(self._process, {"stop": True})

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
        self._process = None

    def _exchange(self, question: Question) -> Iterator[Event]:
        process = self._running()
        self._send(process, {"question": question.as_json()})
        assert process.stdout is not None
        ended = False
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] in ("done", "error"):
                    ended = True
                    if event["event"] == "error":
                        raise InputError(event["text"])
                    return
                yield event
            ended = True
            self._process = None
            raise InputError("The chat process ended unexpectedly (out of memory?): try again.")
        finally:
            if not ended:
                self._end_early(process)

    def _end_early(self, process: subprocess.Popen[str]) -> None:
        """Stop the model and discard the rest of its output, so that the next answer starts clean."""
        self.stop()
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] in ("done", "error"):
                return

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            log = (settings.folder("logs") / "chat.log").open("a", encoding="utf-8")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "studio.conversation.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", bufsize=1,
            )  # fmt: skip
            log.close()
            atexit.register(self.close)
        return self._process

    def _send(self, process: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message, ensure_ascii=False) + "\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            self._process = None
            raise InputError("The chat process has ended: ask again.") from None
