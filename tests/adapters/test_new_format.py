"""A format is one file: a package with one module and an entry point is a format everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULE = '''
"""NumPy archives: one array A and one array B per module, the scale folded into B."""
from pathlib import Path

from adapters.formats.format import Format
from adapters.formats.header import Header


class Archive(Format):
    name, title, suffix, order = "archive", "NumPy", ".npz", 60

    def header(self, path):
        import numpy as np

        with np.load(path) as arrays:
            return Header(path, {f"{name}.weight": arrays[name].shape for name in arrays.files})

    def recognises(self, head):
        return head.path.suffix == ".npz"

    def read(self, head):
        import numpy as np
        import torch

        from adapters.formats.lora import LoraFile, LoraLayer

        layers = {}
        with np.load(head.path) as arrays:
            for name in arrays.files:
                module, _, side = name.rpartition(".lora_")
                layers.setdefault(module.removeprefix("unet."), {})[side] = torch.from_numpy(arrays[name])
        made = {module: LoraLayer(pair["A"], pair["B"], float(len(pair["A"]))) for module, pair in layers.items()}
        return LoraFile({"unet": made}, self.name)

    def refusal(self, file):
        return "NumPy archives hold no magnitudes." if file.is_dora() else ""

    def _write(self, file, path, metadata):
        import numpy as np

        arrays = {}
        for component, module, layer in file.layers():
            arrays[f"{component}.{module}.lora_A"] = layer.A.numpy()
            arrays[f"{component}.{module}.lora_B"] = (layer.scale * layer.B).numpy()
        np.savez(path, **arrays)
        return path


FORMAT = Archive()
'''

USE = """
import sys, torch
from dataclasses import replace
from pathlib import Path

from adapters.errors import InputError
from adapters.formats import LoraFile, LoraLayer, read, write
from studio import library, settings
from studio.cli.app import run

folder = settings.adapter_folders()[0]
block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
layer = LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 3.0)
file = LoraFile({"unet": {block: layer}})
write(file, folder / "one.safetensors", "diffusers")
assert run(["lora", "convert", "one", "--to", "archive", "--out", str(folder / "two.npz")]) == 0
again = read(folder / "two.npz")
assert again.format == "archive" and again.sha256
torch.testing.assert_close(again.parts["unet"][block].delta(), layer.delta())
record = library.find("two")
assert (record.format, record.rank, record.family, record.problem) == ("archive", 2, "sd", ""), record
assert run(["lora", "merge", "one", "two", "--to", "archive", "--out", str(folder / "sum.npz")]) == 0
torch.testing.assert_close(read(folder / "sum.npz").parts["unet"][block].delta(), 2 * layer.delta())
dora = LoraFile({"unet": {block: replace(layer, magnitude=torch.ones(4))}})
try:
    write(dora, folder / "dora.npz", "archive")
except InputError as error:
    assert "no magnitudes" in str(error)
else:
    raise AssertionError("it was written")
try:
    read(folder.parent / "x.xyz")
except InputError:
    pass
assert run(["lora", "convert", "one", "--to", "archiv", "--out", str(folder / "x.npz")]) == 2
print("ok")
"""


@pytest.mark.journey
def test_a_format_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "archive_format.py").write_text(MODULE, encoding="utf-8")
    info = tmp_path / "archive_format-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archive-format\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[adapter_studio.formats]\narchive = archive_format\n", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": paths, "ADAPTER_STUDIO_HOME": str(tmp_path / "home")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip().endswith("ok"), result.stderr
    assert "did you mean 'archive'" in result.stderr


def test_formats_are_listed_without_torch() -> None:
    code = (
        "import sys; from adapters.formats.format import formats, writable;"
        "assert set(writable()) == {'diffusers', 'kohya', 'peft', 'ed-lora'} and 'comfyui' in formats();"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
