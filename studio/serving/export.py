"""For more than one machine: the same base and adapters under vLLM, alone, under Ray Serve, or on Kubernetes.

Adapters are written as PEFT folders, which vLLM reads; what it cannot serve (mixtures of experts, DoRA, embeddings) is
refused by name. Clients do not change: the routes are the same, and ``model`` is the base or an adapter (under Ray
``base:adapter``, which this studio's own server takes too).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapters import files
from adapters.errors import InputError, nearest
from studio import library
from studio.library import scan

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told; every adapter takes the room of the largest."""

TARGETS = ("ray", "vllm", "k8s")
REMOTE = ("s3://", "gs://", "abfss://", "azure://")
"""Where Ray Serve reads adapters from."""

ENGINE_OPTIONS = frozenset({
    "model", "served-model-name", "enable-lora", "max-loras", "max-lora-rank", "max-cpu-loras", "lora-modules", "dtype",
    "max-num-seqs", "host", "port", "api-key",
})  # fmt: skip
"""Options of ``vllm serve`` that are written here (docs.vllm.ai, "Engine Arguments" and "LoRA Adapters")."""

LLM_CONFIG = frozenset({"model_loading_config", "lora_config", "engine_kwargs", "deployment_config"})
LORA_CONFIG = frozenset({"dynamic_lora_loading_path", "max_num_adapters_per_replica"})
"""Fields of Ray's LLMConfig and LoraConfig that are written here (docs.ray.io, "Configuration reference")."""

IMAGE = "vllm/vllm-openai:latest"


@dataclass(frozen=True)
class Plan:
    """What is to be served.

    Attributes:
        source: path or hub id of the base; ``name``: as clients call it.
        adapters: name -> PEFT folder.
        rank: the largest rank, rounded up to one that vLLM knows.
        running: requests at a time.
    """

    source: str
    name: str
    adapters: dict[str, Path]
    rank: int
    running: int
    dtype: str
    folder: Path

    @property
    def slots(self) -> int:
        """Adapters in one batch; every one takes a slot of the largest rank, so few for many."""
        return max(1, min(len(self.adapters), 8, self.running))


@dataclass(frozen=True)
class Written:
    """The files of a configuration, and what it was checked against."""

    files: tuple[Path, ...]
    checked: str


def plan(base: str, folders: Sequence[Path], out: Path, running: int, dtype: str) -> Plan:
    """Collect the adapters of ``folders`` (none = the library's) below ``out`` as PEFT folders.

    Raises:
        InputError: an adapter that vLLM cannot serve.
    """
    from adapters.formats import read, write

    records = [record for folder in folders for record in scan.in_folder(folder)] if folders else library.adapters()
    made, rank = {}, 1
    for record in records:
        if record.family != "language" or record.problem:
            continue
        if record.notes.get("experts"):
            raise InputError(f"'{record.name}' is a mixture of experts, which vLLM cannot serve: this studio's own "
                             "server can, or move it out of the folder.")  # fmt: skip
        file = read(record.path)
        if file.is_dora() or file.tables():
            kind = "a DoRA" if file.is_dora() else "on embeddings"
            raise InputError(f"'{record.name}' is {kind}, which vLLM cannot serve: this studio's own server can, or "
                             "move it out of the folder.")  # fmt: skip
        rank = max(rank, *file.ranks())
        if rank > RANKS[-1]:
            raise InputError(f"'{record.name}' has rank {rank}, above vLLM's largest, {RANKS[-1]}.")
        place = out / "adapters" / record.name
        if record.format == "peft" and record.path.is_dir():
            with files.whole(place) as part:
                shutil.copytree(record.path, part)
        else:
            write(file, place, "peft")
        made[record.name] = place.absolute()
    source = library.resolve_language(base)
    return Plan(source, Path(base).name, made, next(one for one in RANKS if one >= rank), running,
                {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(dtype, "auto"), out)  # fmt: skip


def vllm_options(plan: Plan) -> dict[str, Any]:
    """The options of ``vllm serve``, as its configuration file has them."""
    return {
        "model": plan.source, "served-model-name": plan.name, "enable-lora": True, "max-loras": plan.slots,
        "max-lora-rank": plan.rank, "max-cpu-loras": max(plan.slots, len(plan.adapters)),
        "max-num-seqs": plan.running, "dtype": plan.dtype,
        "lora-modules": [f"{name}={place}" for name, place in plan.adapters.items()],
    }  # fmt: skip


def ray_config(plan: Plan, storage: str) -> dict[str, Any]:
    """A Ray Serve application: replicas of vLLM, requests routed to one that has the adapter."""
    options = vllm_options(plan)
    engine = {name.replace("-", "_"): options[name] for name in
              ("enable-lora", "max-loras", "max-lora-rank", "max-cpu-loras", "max-num-seqs", "dtype")}  # fmt: skip
    model = {
        "model_loading_config": {"model_id": plan.name, "model_source": plan.source},
        "lora_config": {"dynamic_lora_loading_path": storage, "max_num_adapters_per_replica": max(16, plan.slots)},
        "engine_kwargs": engine,
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
    }
    return {"applications": [{"name": plan.name.replace("/", "-"), "route_prefix": "/",
                              "import_path": "ray.serve.llm:build_openai_app",
                              "args": {"llm_configs": [model]}}]}  # fmt: skip


def k8s_objects(plan: Plan) -> list[dict[str, Any]]:
    """A volume with base and adapters, a deployment of vLLM, and a service in front of it."""
    name = "".join(letter if letter.isalnum() else "-" for letter in plan.name.lower()).strip("-")
    labels = {"app": name}
    options = vllm_options(plan) | {"model": "/models/base", "lora-modules": [
        f"{one}=/models/adapters/{one}" for one in plan.adapters
    ]}  # fmt: skip
    container = {
        "name": "vllm", "image": IMAGE, "args": arguments(options),
        "ports": [{"containerPort": 8000}], "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 5, "failureThreshold": 120},
    }  # fmt: skip
    claim = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "20Gi"}}}
    pod = {"containers": [container],
           "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": f"{name}-models"}}]}  # fmt: skip
    return [
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": f"{name}-models"}, "spec": claim},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "labels": labels},
         "spec": {"replicas": 1, "selector": {"matchLabels": labels},
                  "template": {"metadata": {"labels": labels}, "spec": pod}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
         "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]}},
    ]  # fmt: skip


def arguments(options: dict[str, Any]) -> list[str]:
    """The command line of ``vllm serve`` for these options, the model first."""
    found = [str(options["model"])]
    for name, value in options.items():
        if name == "model" or value == []:
            continue
        found.append(f"--{name}")
        found += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return found


def write(target: str, plan: Plan, storage: str = "") -> Written:
    """Write the configuration for ``target`` into the plan's folder.

    Args:
        storage: for ray, the address under which the adapters are (s3://bucket/folder).

    Raises:
        InputError: no such target, or ray without a storage.
    """
    if target not in TARGETS:
        raise InputError(f"There is no export '{target}'{nearest(target, TARGETS)}: use one of {', '.join(TARGETS)}.")
    if target == "ray" and not storage.startswith(REMOTE):
        raise InputError(
            f"Ray Serve reads adapters from object storage: give --storage with an address that starts with "
            f"{', '.join(REMOTE)}, and copy '{plan.folder / 'adapters'}' there."
        )
    checked = check_vllm(vllm_options(plan))
    if target == "ray":
        config = ray_config(plan, storage)
        checked = f"{check_ray(config)}; {checked}"
        return Written((_yaml(plan.folder / "ray.yaml", [config]),), checked)
    if target == "k8s":
        made = _yaml(plan.folder / "k8s.yaml", k8s_objects(plan))
        return Written((made,), f"Kubernetes' documented fields; {checked}")
    return Written((_yaml(plan.folder / "vllm.yaml", [vllm_options(plan)]),), checked)


def _yaml(file: Path, documents: Sequence[dict[str, Any]]) -> Path:
    return files.write_text(file, yaml.safe_dump_all(documents, sort_keys=False))


def check_vllm(options: dict[str, Any]) -> str:
    """What the options were checked against.

    Raises:
        InputError: the installed vLLM has no such option.
    """
    if importlib.util.find_spec("vllm") is None:
        unknown = sorted(set(options) - ENGINE_OPTIONS)
        assert not unknown, unknown
        return "vLLM's documented options (vllm is not installed here)"
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {name.replace("_", "-") for name in AsyncEngineArgs.__dataclass_fields__}
    if unknown := sorted(set(options) - known - {"lora-modules", "host", "port", "api-key"}):
        raise InputError(f"The installed vLLM {vllm.__version__} has no option '{unknown[0]}': update it.")
    return f"the options of the installed vLLM {vllm.__version__}"


def check_ray(config: dict[str, Any]) -> str:
    """What the configuration was checked against.

    Raises:
        InputError: the installed Ray does not take it.
    """
    if importlib.util.find_spec("ray") is None:
        for model in config["applications"][0]["args"]["llm_configs"]:
            assert set(model) <= LLM_CONFIG
            assert set(model["lora_config"]) <= LORA_CONFIG
        return "Ray Serve's documented fields (ray is not installed here)"
    import ray
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(config)
        if importlib.util.find_spec("vllm") is not None:
            from ray.serve.llm import LLMConfig

            for model in config["applications"][0]["args"]["llm_configs"]:
                LLMConfig.model_validate(model)
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        raise InputError(f"The installed Ray {ray.__version__} does not take this: {told}.") from None
    return f"the schema of the installed Ray {ray.__version__}"


def find_vllm() -> str:
    """The program ``vllm``.

    Raises:
        InputError: it is not installed.
    """
    program = shutil.which("vllm")
    if program is None or importlib.util.find_spec("vllm") is None:
        raise InputError(
            "The backend 'vllm' needs vLLM, which is not installed here. It wants other versions of transformers and "
            "fastapi than the studio: install it in an environment of its own, and run the file that "
            "studio serve --export vllm  writes."
        )
    return program


def run_vllm(plan: Plan, host: str, port: int, api_key: str) -> None:
    """Become ``vllm serve`` with the plan's adapters; does not return.

    Raises:
        InputError: vLLM is not installed, or lacks one of these options.
    """
    program = find_vllm()
    options = vllm_options(plan) | {"host": host, "port": port}
    check_vllm(options)
    environment = os.environ | ({"VLLM_API_KEY": api_key} if api_key else {})
    os.execve(program, [program, "serve", *arguments(options)], environment)
