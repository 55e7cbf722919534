"""Adapter files in and out: PEFT directories, diffusers and kohya safetensors, one form in memory.

``read`` recognises a file; ``fit`` (in :mod:`adapters.formats.fit`) lays it onto a model; the writers make files that
PEFT, diffusers and the kohya family of programs load.
"""

from adapters.formats.diffusers_file import write_diffusers
from adapters.formats.ed_lora import write_ed_lora
from adapters.formats.kohya import write_kohya
from adapters.formats.lora import LoraFile, LoraLayer
from adapters.formats.peft_directory import write_peft
from adapters.formats.read import read
from adapters.formats.tensors import sha256

__all__ = ["LoraFile", "LoraLayer", "read", "sha256", "write_diffusers", "write_ed_lora", "write_kohya", "write_peft"]
