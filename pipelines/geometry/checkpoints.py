"""Loading weights of the DUSt3R family, strictly and safely.

Accepted are the public ``.pth`` files ({"args": Namespace, "model": tensors}, read without unpickling code), folders
and hub repositories with ``config.json`` and ``model.safetensors``, and MASt3R's (points only). No tensor may be
missing or unexpected.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import files
from adapters.errors import InputError
from adapters.formats.tensors import refuse_packed
from pipelines.geometry.licence import PUBLIC, licence_by_name, licence_of
from pipelines.geometry.network import NetworkConfig, PointmapNetwork

_KNOWN = {
    "img_size", "patch_size", "enc_embed_dim", "enc_depth", "enc_num_heads", "dec_embed_dim", "dec_depth",
    "dec_num_heads", "mlp_ratio", "head_type", "depth_mode", "conf_mode",
}  # fmt: skip
_IGNORED = {
    "patch_embed_cls", "output_mode", "landscape_only", "freeze", "mask_ratio", "norm_im2_in_dec", "norm_layer",
    "two_confs", "desc_conf_mode", "pos_embed", "rope_base", "licence", "model_type", "architectures",
}  # fmt: skip
_LOCAL_FEATURES = "head_local_features."


@dataclass(frozen=True)
class Checkpoint:
    """Loaded weights.

    Attributes:
        network: in evaluation mode.
        name: of the file, folder or repository.
        sha256: of the file with the weights.
        licence: of the weights.
        notes: what was left out.
    """

    network: PointmapNetwork
    name: str
    sha256: str
    licence: str
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """Name, hash and licence, recorded in files made with these weights."""
        return {"name": self.name, "sha256": self.sha256, "licence": self.licence}


def open_checkpoint(source: str | Path, device: Any = "cpu") -> Checkpoint:
    """Load a ``.pth`` file, a folder or a hub id.

    Raises:
        InputError: it does not exist, cannot be read, or its tensors do not fit the model.
    """
    place = Path(source)
    if place.is_dir():
        config, tensors, licence = _folder(place)
        file = place / "model.safetensors"
    elif place.is_file():
        config, tensors = _pth(place)
        file, licence = place, licence_by_name(place.name)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        folder = _download(str(source))
        config, tensors, licence = _folder(folder)
        file, licence = folder / "model.safetensors", PUBLIC.get(str(source), licence)
    else:
        raise InputError(f"There is no checkpoint '{source}': give a .pth file, a folder or a hub id (owner/name).")
    notes: list[str] = []
    network = build(config, tensors, notes)
    return Checkpoint(network.to(device).eval(), place.name, files.sha256(file), licence, tuple(notes))


# ------------------------------------------------------------------------------------------------ files


def _folder(place: Path) -> tuple[NetworkConfig, dict[str, Tensor], str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((place / "config.json").read_text("utf-8"))
        tensors = load_file(place / "model.safetensors")
    except FileNotFoundError:
        raise InputError(f"'{place}' must contain config.json and model.safetensors.") from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"The checkpoint '{place.name}' is damaged: {error}") from None
    return config_from(values), tensors, licence_of(place)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:
        raise InputError(
            f"'{name}' cannot be fetched from the hub ({type(error).__name__}): download it first."
        ) from None


def _pth(file: Path) -> tuple[NetworkConfig, dict[str, Tensor]]:
    try:
        refuse_packed(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"'{file.name}' cannot be opened safely as a checkpoint ({type(error).__name__}): it is damaged or holds "
            "more than tensors and settings."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"'{file.name}' is not a checkpoint of the DUSt3R family: it has no 'model'.")
    tensors = content["model"]
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"'{file.name}': 'model' must hold tensors only.")
    if "croco_kwargs" in content:
        raise InputError(
            f"'{file.name}' is a CroCo encoder and decoder without heads, which cannot reconstruct: use a DUSt3R model."
        )
    arguments = content.get("args")
    text = getattr(arguments, "model", None) if isinstance(arguments, argparse.Namespace) else None
    if not isinstance(text, str):
        raise InputError(f"'{file.name}' does not say which model it is (args.model is missing).")
    return config_from(parse_constructor(text)), tensors


# ------------------------------------------------------------------------------------------------ settings


def parse_constructor(text: str) -> dict[str, Any]:
    """Keyword arguments of an expression like ``AsymmetricCroCo3DStereo(head_type='dpt', ...)``; nothing is executed.

    Raises:
        InputError: the text is not one such call with literal values (``inf`` and ``-inf`` count as literals).
    """
    problem = InputError("The checkpoint's model expression is not understood: it must be one call with plain values.")
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise problem
    if call.func.id not in ("AsymmetricCroCo3DStereo", "AsymmetricMASt3R"):
        raise InputError(f"'{call.func.id}' is not a model of the DUSt3R family.")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in _KNOWN | _IGNORED:
            raise InputError(f"The checkpoint's model expression has an unknown argument '{keyword.arg}'.")
        values[keyword.arg] = _literal(keyword.value, problem)
    return values


def _literal(node: ast.expr, problem: InputError) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, problem)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(item, problem) for item in node.elts)
    raise problem


def config_from(values: Mapping[str, Any]) -> NetworkConfig:
    """The configuration in ``config.json`` or in a constructor's arguments.

    Raises:
        InputError: an unknown key, or a variant that is not supported.
    """
    if not isinstance(values, Mapping):
        raise InputError("config.json must contain names and values.")
    unknown = sorted(set(values) - _KNOWN - _IGNORED)
    if unknown:
        raise InputError(f"The model's configuration has unknown entries: {', '.join(unknown)}.")
    for name, allowed in (
        ("pos_embed", ("RoPE100",)), ("norm_im2_in_dec", (True,)),
        ("output_mode", ("pts3d", "pts3d+desc24")), ("patch_embed_cls", ("PatchEmbedDust3R", "ManyAR_PatchEmbed")),
    ):  # fmt: skip
        if values.get(name, allowed[0]) not in allowed:
            known = " or ".join(map(str, allowed))
            raise InputError(f"The model's {name} '{values[name]}' is not supported: it must be {known}.")
    chosen = {name: values[name] for name in _KNOWN if name in values}
    if chosen.get("head_type") == "catmlp+dpt":
        chosen["head_type"] = "dpt"
    for name in ("img_size", "depth_mode", "conf_mode"):
        if name in chosen:
            many = chosen[name]
            many = (many, many) if isinstance(many, int) else tuple(many)
            chosen[name] = tuple(_number(v) if k else v for k, v in enumerate(many)) if name != "img_size" else many
    assert set(chosen) <= {f.name for f in fields(NetworkConfig)}
    try:
        return NetworkConfig(**chosen)
    except (TypeError, ZeroDivisionError):
        raise InputError(f"The model's configuration is not understood: {dict(chosen)}.") from None


def _number(value: Any) -> float:
    """A number; JSON stores infinite ones as text."""
    return float(value) if isinstance(value, (int, float, str)) else math.nan


# ------------------------------------------------------------------------------------------------ tensors


def build(config: NetworkConfig, tensors: Mapping[str, Tensor], notes: list[str] | None = None) -> PointmapNetwork:
    """A network with these weights in fp32.

    Raises:
        InputError: missing or unexpected keys, aliases that differ, wrong shapes, or values that are not finite.
    """
    tensors = dict(tensors)
    extra = [key for key in tensors if _LOCAL_FEATURES in key]
    for key in extra:
        del tensors[key]
    if extra and notes is not None:
        notes.append("descriptor heads are left out: points only")
    with torch.device("meta"):
        network = PointmapNetwork(config)
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    _complete_aliases(tensors, wanted)
    tensors.setdefault("mask_token", torch.zeros(wanted["mask_token"]))
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise InputError(
            f"The weights do not fit the model: {len(missing)} missing ({', '.join(missing[:10])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:10])})."
        )
    wrong = [key for key in wanted if tensors[key].shape != wanted[key]]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"'{key}' has the shape {tuple(tensors[key].shape)} instead of {tuple(wanted[key])} "
            f"({len(wrong)} tensors of a wrong shape)."
        )
    network = network.to_empty(device="cpu")
    network.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True)
    if not all(p.isfinite().all() for p in network.parameters()):
        raise InputError("The weights hold values that are not finite: the file is damaged.")
    return network


def _complete_aliases(tensors: dict[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Add the missing one of ``layerN_rn`` and ``layer_rn.(N-1)``, two names of one tensor; files may hold either."""
    for key in wanted:
        found = re.fullmatch(r"(.*\.scratch)\.layer(\d)_rn\.weight", key)
        if not found:
            continue
        other = f"{found[1]}.layer_rn.{int(found[2]) - 1}.weight"
        a, b = tensors.get(key), tensors.get(other)
        if a is not None and b is not None and not (a.shape == b.shape and torch.equal(a, b)):
            raise InputError(f"'{key}' and '{other}' must be the same tensor, but differ.")
        for name in (key, other):
            if name not in tensors and (a is not None or b is not None):
                tensors[name] = a if a is not None else b  # type: ignore[assignment]


def from_croco(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of encoder and decoders to start training from CroCo v2: the second decoder is a copy of the first."""
    kept = {key: value for key, value in tensors.items() if not key.startswith("prediction_head.")}
    copies = {
        key.replace("dec_blocks.", "dec_blocks2.", 1): v.clone()
        for key, v in kept.items()
        if key.startswith("dec_blocks.")
    }
    return {**copies, **kept}


def save_folder(network: PointmapNetwork, folder: Path, licence: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write ``config.json`` and ``model.safetensors`` (aliases once); returns ``folder``."""
    from safetensors.torch import save_file

    from adapters import files

    tensors = {k: v.to(dtype).contiguous() for k, v in network.state_dict().items() if ".layer_rn." not in k}
    files.write(folder / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    values = {**network.config.to_dict(), "pos_embed": "RoPE100", "licence": licence}
    values["depth_mode"] = ["exp", "-inf", "inf"] if network.config.depth_mode[0] == "exp" else values["depth_mode"]
    values["conf_mode"] = [values["conf_mode"][0], 1, "inf"]
    files.write_text(folder / "config.json", json.dumps(values, indent=1) + "\n")
    return folder
