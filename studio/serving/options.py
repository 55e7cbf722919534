"""The options of ``studio serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(flag: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(flag, rich_help_panel=panel, help=help, **more)


_ENGINE, _ACCESS, _ELSEWHERE = "Engine", "Access", "Other engines"

Base = Annotated[str, typer.Argument(help="Language model: name in the library, directory or hub id.")]
Folders = Annotated[
    list[Path] | None,
    typer.Option("--adapters", metavar="DIR", help="Folder of adapters, repeatable; without it the library's."),
]
Name = Annotated[str, typer.Option("--name", help="Name of the base for clients; empty = its own.")]
Pin = Annotated[list[str] | None, typer.Option("--pin", help="An adapter that stays in the pool; repeatable.")]
Automatic = Annotated[
    bool, typer.Option("--auto/--no-auto", help="Offer the model 'auto': the request decides which adapter answers.")
]
Threshold = Annotated[
    float, typer.Option("--threshold", min=0, max=1, help="Of 'auto': below this confidence the base answers.")
]
Pictures = Annotated[
    str, typer.Option("--pictures", metavar="BASE", help="Also draw, on tinymoji or another base of pictures.")
]

Host = Annotated[str, _option("--host", _ACCESS, "Address to listen on.")]
Port = Annotated[int, _option("--port", _ACCESS, "Port to listen on; 0 = a free one.", min=0, max=65535)]
ApiKey = Annotated[str, _option("--api-key", _ACCESS, "Clients must know it.", envvar="ADAPTER_STUDIO_API_KEY")]
AllowHost = Annotated[list[str] | None, _option("--allow-host", _ACCESS, "Another name of this server; repeatable.")]
RuntimeLora = Annotated[
    bool, _option("--allow-runtime-lora", _ACCESS, "Clients may load and unload adapters of the folders.")
]
MaxBody = Annotated[int, _option("--max-body", _ACCESS, "Largest request in bytes.", min=1000)]

PoolGb = Annotated[float, _option("--pool-gb", _ENGINE, "Memory for cache and adapters together.")]
MaxRunning = Annotated[int, _option("--max-running", _ENGINE, "Requests at a time.")]
MaxWaiting = Annotated[int, _option("--max-waiting", _ENGINE, "Further requests that wait; more are refused (429).")]
MaxBatchTokens = Annotated[int, _option("--max-batch-tokens", _ENGINE, "Tokens of prompts in one step.")]
MaxRank = Annotated[int, _option("--max-rank", _ENGINE, "Largest rank of an adapter.")]
Scheduler = Annotated[str, _option("--scheduler", _ENGINE, "fcfs, cluster, early-abort or vtc.")]
Slo = Annotated[float, _option("--slo", _ENGINE, "Of early-abort: seconds until the first token.")]
Optimistic = Annotated[
    bool, _option("--optimistic", _ENGINE, "Admit what fits now; when the pool is full, the youngest starts again.")
]

Backend = Annotated[str, _option("--backend", _ELSEWHERE, "auto, torch, triton or reference; vllm = run vLLM instead.")]
Export = Annotated[
    str, _option("--export", _ELSEWHERE, "Write a configuration for vLLM instead of serving.", metavar="ray|vllm|k8s")
]
Storage = Annotated[str, _option("--storage", _ELSEWHERE, "For ray: where the adapters will be, s3://...")]
Out = Annotated[Path, _option("--out", _ELSEWHERE, "Folder for the configuration and the adapters.")]
