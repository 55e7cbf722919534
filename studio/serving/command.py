"""``studio serve``: language models with any number of adapters for programs that speak OpenAI's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from adapters.errors import InputError
from studio import silence
from studio.cli.output import Json, Output, Quiet
from studio.conversation import options
from studio.serving import options as own
from studio.serving.address import check_open, listening, names

HELP = "Serve a language model with its adapters over HTTP, as OpenAI does."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", help=HELP)(serve)


def serve(
    base: own.Base = "smollm2",
    adapters: own.Folders = None,
    name: own.Name = "",
    pin: own.Pin = None,
    automatic: own.Automatic = True,
    threshold: own.Threshold = 0.5,
    pictures: own.Pictures = "",
    host: own.Host = "127.0.0.1",
    port: own.Port = 8000,
    api_key: own.ApiKey = "",
    allow_host: own.AllowHost = None,
    allow_runtime_lora: own.RuntimeLora = False,
    max_body: own.MaxBody = 2**20,
    device: options.Device = "auto",
    dtype: options.Precision = "auto",
    quantization: options.Quantization = "none",
    pool_gb: own.PoolGb = 1.0,
    max_running: own.MaxRunning = 64,
    max_waiting: own.MaxWaiting = 1024,
    max_batch_tokens: own.MaxBatchTokens = 512,
    max_rank: own.MaxRank = 512,
    scheduler: own.Scheduler = "fcfs",
    slo: own.Slo = 6.0,
    optimistic: own.Optimistic = False,
    backend: own.Backend = "auto",
    export: own.Export = "",
    storage: own.Storage = "",
    out: own.Out = Path("serving"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a language model with its adapters; it runs until Ctrl-C."""
    output = Output(json, quiet)
    options.check(dtype, quantization)
    folders = [_folder(place) for place in adapters or ()]
    if export or backend == "vllm":
        from studio.serving import export as elsewhere

        if not export:
            check_open(host, api_key)
            elsewhere.find_vllm()
        plan = elsewhere.plan(base, folders, out, max_running, dtype)
        if export:
            made = elsewhere.write(export, plan, storage)
            output.result({"files": [str(file) for file in made.files], "checked": made.checked},
                          "\n".join(map(str, made.files)) + f"\nChecked against: {made.checked}.")  # fmt: skip
            return
        elsewhere.run_vllm(plan, host, port, api_key)
        return
    place = listening(host, port, api_key)
    silence.library_warnings()
    silence.loading_bars()
    import uvicorn

    from studio.serving.app import ServerOptions, create_app
    from studio.serving.engine import ServeConfig
    from studio.serving.service import ServeEngine

    config = ServeConfig(
        pool_gb=pool_gb, max_running=max_running, max_batch_tokens=max_batch_tokens, max_waiting=max_waiting,
        max_rank=max_rank, scheduler=scheduler, slo=slo, backend=backend, optimistic=optimistic,
    )  # fmt: skip
    config.check()
    output.note(f"Loading {base} ...")
    engine = ServeEngine.from_pretrained(
        base, config, device=device, dtype=dtype, quantization=quantization, name=name, folders=folders,
        library=not folders,
    )  # fmt: skip
    for one in pin or ():
        engine.adapters.pin(one)
    if automatic:
        from studio.serving.automatic import Chooser

        engine.pick = Chooser(engine.adapters, threshold)
    drawing: Any = None
    if pictures:
        from studio.serving.pictures import PictureService

        drawing = PictureService.open(pictures, device, dtype, folders)
    roots = tuple(folders) if folders else _library_folders()
    access = ServerOptions(api_key, allow_runtime_lora, roots, max_body, names(host, allow_host or ()))
    url = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
    output.result({"url": url, "base": engine.name},
                  f"Serving {engine.name} at {url}/v1  (Ctrl-C stops it)")  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(create_app(engine, access, drawing), log_level="warning", access_log=False))
    server.run(sockets=[place])


def _folder(place: Path) -> Path:
    if not place.expanduser().is_dir():
        raise InputError(f"'{place}' is not a folder: give one that holds adapters.")
    return place.expanduser().absolute()


def _library_folders() -> tuple[Path, ...]:
    from studio import settings

    return tuple(settings.adapter_folders())
