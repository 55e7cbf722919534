"""Adapter Studio from Python: the jobs of the app and the command line as functions.

    import studio

    pictures = studio.compose("a fox and a robot", ["fox", "robot"], seed=1)
    pictures[0].save("fox-and-robot.png")

:func:`compose` makes pictures, :func:`load` gives the pipeline behind them, :func:`train` trains an adapter,
:func:`reconstruct` turns photos into 3D, :func:`chat` asks a language model, :func:`ask` asks about a picture,
:func:`classify` tells RNA transcripts apart, :func:`transcribe` writes down speech. Nothing heavy is imported before
the first of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.api import ask as ask
    from studio.api import chat as chat
    from studio.api import classify as classify
    from studio.api import compose as compose
    from studio.api import load as load
    from studio.api import reconstruct as reconstruct
    from studio.api import train as train
    from studio.api import transcribe as transcribe

    __version__: str

__all__ = ["__version__", "ask", "chat", "classify", "compose", "load", "reconstruct", "train", "transcribe"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("adapter-studio")
    if name in __all__:
        from studio import api

        return getattr(api, name)
    raise AttributeError(f"module 'studio' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
