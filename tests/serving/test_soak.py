"""Two thousand requests of two hundred clients, some of which leave, while adapters come, go and break."""

from __future__ import annotations

import asyncio
import random
import shutil
import time

import httpx
import psutil
import pytest

from pipelines.language.loading import open_model
from studio.serving.app import ServerOptions
from studio.serving.engine import ServeConfig
from studio.serving.service import ServeEngine
from tests.loops import run
from tests.serving.test_engine import alone
from tests.serving.test_server import KEY, Running

REQUESTS, CLIENTS, CHECKED = 2000, 200, 500


@pytest.mark.slow
def test_nothing_leaks_and_nobody_gets_another_adapters_answer(base, several, make, tmp_path):
    shelf = tmp_path / "shelf"
    paths = {name: several[name] for name in ("small", "medium", "large", "rslora", "dora")}
    for name, path in paths.items():
        shutil.copytree(path, shelf / name)
    for extra in ("coming", "broken"):
        shutil.copytree(several["small"], shelf / extra)
    prompts = [[10 + number, 40, 60, 80 + 3 * number] for number in range(4)]
    wanted = {(name, number): alone(base, path, ids, 8) for name, path in [("tiny", None), *paths.items()]
              for number, ids in enumerate(prompts)}  # fmt: skip
    config = ServeConfig(pool_pages=700, max_running=24, max_waiting=4000)
    serve = ServeEngine(open_model(base), "tiny", config, [shelf])
    step = serve.engine.step

    def checked_step() -> bool:
        worked = step()
        serve.engine.pool.check()
        return worked

    serve.engine.step = checked_step  # type: ignore[method-assign]
    server = Running(serve, ServerOptions(KEY, True, (shelf,)))
    order = random.Random(0)
    jobs = [(order.choice(["tiny", *paths]), order.randrange(4), order.random() < 0.1) for _ in range(REQUESTS)]
    compared = wrong = failed = 0
    process, sizes = psutil.Process(), []
    tokenizer = serve.base.tokenizer

    async def client(http: httpx.AsyncClient, mine: list[tuple[str, int, bool]]) -> None:
        nonlocal compared, wrong, failed
        for name, number, leaves in mine:
            body = {"model": name, "prompt": prompts[number], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            try:
                if leaves:
                    more = {"stream": True, "max_tokens": 60}
                    async with http.stream("POST", "/v1/completions", json=body | more) as one:
                        await one.aiter_lines().__anext__()
                    continue
                answer = await http.post("/v1/completions", json=body)
            except httpx.HTTPError:
                failed += 1
                continue
            assert answer.status_code == 200, answer.text
            text = answer.json()["choices"][0]["text"]
            compared += 1
            wrong += text != tokenizer.decode(wanted[name, number], skip_special_tokens=True)
            if compared % 100 == 0:
                sizes.append(process.memory_info().rss)

    async def trouble(http: httpx.AsyncClient) -> None:
        (shelf / "broken" / "adapter_model.safetensors").write_bytes(b"not weights")
        for number in range(60):
            name = f"more-{number}"
            load = {"lora_name": name, "lora_path": str(shelf / "coming")}
            assert (await http.post("/v1/load_lora_adapter", json=load)).status_code == 200
            body = {"model": "broken", "prompt": "x", "max_tokens": 2}
            assert (await http.post("/v1/completions", json=body)).status_code == 400
            await http.post("/v1/completions", json=body | {"model": name})
            assert (await http.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code == 200

    async def everybody() -> None:
        limits = httpx.Limits(max_connections=CLIENTS + 10)
        async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600,
                                     limits=limits) as http:  # fmt: skip
            await asyncio.gather(trouble(http), *(client(http, jobs[n::CLIENTS]) for n in range(CLIENTS)))

    run(everybody())
    until = time.monotonic() + 30
    while not serve.engine.idle and time.monotonic() < until:
        time.sleep(0.1)
    assert serve.engine.idle
    assert server.http.get("/health").status_code == 200
    server.stop()
    print({"compared": compared, "wrong": wrong, "failed": failed, "rss": [size // 2**20 for size in sizes]})
    assert (wrong, failed) == (0, 0)
    assert compared >= CHECKED
    half = len(sizes) // 2
    assert max(sizes[half:]) <= 1.05 * max(sizes[:half])
    assert serve.engine.pool.stats().kv == 0
