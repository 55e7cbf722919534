"""The web app's chat process: questions in as JSON lines, events out; it ends when it has been idle.

{"question": {...}}  ->  {"event": "piece", ...} ... {"event": "done"} or {"event": "error", "text": ...}
{"stop": true}       ->  the answer under way stops
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, TextIO

from studio import error_sentences, silence
from studio.conversation import Question

IDLE_SECONDS = 600.0


def main(source: TextIO, target: TextIO, idle: float = IDLE_SECONDS) -> None:
    """Answer questions from ``source`` until it ends, or until none has come for ``idle`` seconds."""
    silence.library_warnings()
    questions: queue.Queue[dict[str, Any] | None] = queue.Queue()
    stop = threading.Event()

    def listen() -> None:
        for line in source:
            asked = json.loads(line)
            if asked.get("stop"):
                stop.set()
            else:
                questions.put(asked["question"])
        stop.set()
        questions.put(None)

    def say(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=target, flush=True)

    threading.Thread(target=listen, name="questions", daemon=True).start()
    session: Any = None
    while True:
        try:
            asked = questions.get(timeout=idle)
        except queue.Empty:
            return
        if asked is None:
            return
        stop.clear()
        try:
            if session is None:
                from studio.conversation.session import Session

                session = Session()
            for event in session.ask(Question.from_json(asked), stop.is_set):
                say(event)
            say({"event": "done"})
        except Exception as error:
            if not error_sentences.expected(error):
                import traceback

                traceback.print_exc()
            say({"event": "error", "text": error_sentences.sentence(error)})


if __name__ == "__main__":
    # Libraries may print to stdout: keep our channel separate.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(sys.stdin, channel)
