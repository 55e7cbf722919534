"""The server, through the ``openai`` client over a socket: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import InputError
from pipelines.language.answer import prompt as prompt_of
from pipelines.language.loading import open_model
from pipelines.language.tokens import Sampling
from studio.serving.app import ServerOptions, create_app
from studio.serving.engine import ServeConfig
from studio.serving.service import ServeEngine
from tests.loops import run

openai = pytest.importorskip("openai")

KEY = "secret-of-the-tests"


class Running:
    """A server in a thread of this process."""

    def __init__(self, serve: ServeEngine, options: ServerOptions) -> None:
        self.serve = serve
        self.server = uvicorn.Server(uvicorn.Config(create_app(serve, options), port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def shelf(several: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, as ``--adapters`` names one."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("small", "large", "dora"):
        shutil.copytree(several[name], folder / name)
    return folder


@pytest.fixture(scope="module")
def running(base: Path, shelf: Path) -> Iterator[Running]:
    serve = ServeEngine(open_model(base), "tiny", ServeConfig(pool_pages=6000, max_waiting=40), [shelf])
    server = Running(serve, ServerOptions(KEY, True, (shelf,), max_body=20000))
    yield server
    server.stop()
    assert serve.engine.pool.stats().kv == 0


def greedy(base: Path, path: Path | None, ids: list[int], tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model = PeftModel.from_pretrained(model, path).eval() if path else model
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                              max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
    return AutoTokenizer.from_pretrained(base).decode(made[0, len(ids) :], skip_special_tokens=True)


def test_completions_are_those_of_the_adapter_that_is_named(running, base, shelf):
    ids = AutoTokenizer.from_pretrained(base)("hello there")["input_ids"]
    more = {"ignore_eos": True}
    for model, path in (("tiny", None), ("small", shelf / "small"), ("tiny:large", shelf / "large")):
        found = running.client.completions.create(model=model, prompt="hello there", max_tokens=9, temperature=0,
                                                  extra_body=more)  # fmt: skip
        assert found.choices[0].text == greedy(base, path, ids, 9)
        assert found.choices[0].finish_reason == "length"
        assert found.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
            "prompt_tokens": len(ids), "completion_tokens": 9, "total_tokens": len(ids) + 9}  # fmt: skip
    found = running.client.completions.create(model="tiny", prompt=["hello there", ids], max_tokens=9, temperature=0,
                                              n=2, extra_body=more | {"adapter_id": "dora"}, logprobs=1)  # fmt: skip
    assert {choice.text for choice in found.choices} == {greedy(base, shelf / "dora", ids, 9)}
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.top_logprobs) == 9
    assert found.model == "dora"


def test_chats_whole_and_streamed_are_the_same(running, base, shelf):
    parts = [{"type": "text", "text": "hé 你 "}, {"type": "text", "text": "x"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    asked: dict[str, Any] = {"model": "large", "messages": messages, "max_completion_tokens": 12, "temperature": 0,
                             "extra_body": {"ignore_eos": True}, "user": "me"}  # fmt: skip
    whole = running.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé 你 x"}]
    ids = prompt_of(AutoTokenizer.from_pretrained(base), talk, "cpu")["input_ids"][0].tolist()
    wanted = greedy(base, shelf / "large", ids, 12)
    assert whole.choices[0].message.content == wanted
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 12
    assert entries[0].logprob == entries[0].top_logprobs[0].logprob <= 0
    text, last, used = "", None, None
    with running.client.chat.completions.create(**asked, stream=True,
                                                stream_options={"include_usage": True}) as chunks:  # fmt: skip
        for number, chunk in enumerate(chunks):
            if chunk.usage:
                used = chunk.usage
                continue
            assert number or chunk.choices[0].delta.role == "assistant"
            text += chunk.choices[0].delta.content or ""
            last = chunk.choices[0].finish_reason or last
    assert (text, last) == (wanted, "length")
    assert used == whole.usage
    stop = wanted[3:6]
    cut = running.client.chat.completions.create(**asked, stop=[stop])
    assert cut.choices[0].message.content == wanted[: wanted.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_n_differ(running):
    asked: dict[str, Any] = {"model": "small", "prompt": "abc", "max_tokens": 10, "temperature": 1.5, "seed": 5, "n": 3}
    first, second = (running.client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1
    with running.client.completions.create(**asked, stream=True) as chunks:
        streamed = ["", "", ""]
        for chunk in chunks:
            streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_many_clients_at_once_each_get_their_own(running, base, shelf):
    async def all_of_them() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY)
        names = ["tiny", "small", "large", "dora"]
        found = await asyncio.gather(*(
            client.completions.create(model=names[number % 4], prompt="xyz", max_tokens=6, temperature=0,
                                      extra_body={"ignore_eos": True})
            for number in range(24)
        ))  # fmt: skip
        return [one.choices[0].text for one in found]

    ids = AutoTokenizer.from_pretrained(base)("xyz")["input_ids"]
    wanted = [greedy(base, path, ids, 6) for path in (None, shelf / "small", shelf / "large", shelf / "dora")]
    assert run(all_of_them()) == wanted * 6


def test_models_are_listed_and_new_ones_found_without_a_restart(running, several, shelf):
    listed = [card.id for card in running.client.models.list()]
    assert listed[0] == "tiny"
    assert {"small", "large", "dora"} <= set(listed)
    assert running.client.models.retrieve("small").model_extra["parent"] == "tiny"
    shutil.copytree(several["medium"], shelf / "fresh")
    assert "fresh" in [card.id for card in running.client.models.list()]
    assert running.client.completions.create(model="fresh", prompt="a", max_tokens=2).choices
    shutil.rmtree(shelf / "fresh")
    with pytest.raises(openai.NotFoundError):
        running.client.completions.create(model="fresh", prompt="a", max_tokens=2)


@pytest.mark.parametrize(("body", "status", "told"), [
    ({"model": "smal"}, 404, "did you mean 'small'"),
    ({"model": "../small"}, 404, "no model"),
    ({"n": 0}, 400, "n:"),
    ({"temperature": -1}, 400, "temperature:"),
    ({"logprobs": 99}, 400, "logprobs:"),
    ({"max_tokens": 5000}, 400, "more than the 512"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [999999]}, 400, "not in the vocabulary"),
    ({"prompt": ""}, 400, "no tokens"),
    ({"logit_bias": {"999999": 1}}, 400, "logit_bias names the token 999999"),
    ({"best_of": 3}, 400, "best_of: is not a field that is served here"),
    ({"nonsense": 1}, 400, "nonsense: is not a field that is served here"),
    ({"stream_options": {"include_usage": True}}, 400, "set stream to true"),
    ({"response_format": {"type": "json_object"}}, 400, "is not served"),
    ({"stop": [""]}, 400, "stop text is empty"),
    ({"prompt": "a" * 30000}, 413, "larger than 20000 bytes"),
])  # fmt: skip
def test_what_is_wrong_is_refused_in_openais_shape(running, body, status, told):
    found = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2} | body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert told in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_neutral_fields_of_other_clients_are_taken(running):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "best_of": 1, "echo": False, "suffix": None, "user": "x"}
    assert running.http.post("/v1/completions", json=body).status_code == 200
    broken = running.http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert running.http.post("/v1/nowhere", json={}).json()["error"]["type"] == "invalid_request_error"


def test_the_key_is_asked_for(running):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_adapters_are_loaded_and_unloaded_by_clients_that_may(running, base, shelf, several, tmp_path):
    def post(route: str, **body: Any) -> httpx.Response:
        return running.http.post(f"/v1/{route}_lora_adapter", json=body)

    path = str(shelf / "large")
    assert post("load", lora_name="mine", lora_path=path).text.startswith("Success")
    assert post("load", lora_name="mine", lora_path=path).status_code == 400
    assert post("load", lora_name="mine", lora_path=path, load_inplace=True).status_code == 200
    assert post("load", lora_name="tiny", lora_path=path).status_code == 400
    refused = post("load", lora_name="away", lora_path=str(several["small"]))
    assert "not in a folder from which" in refused.json()["error"]["message"]
    assert post("load", lora_name="up", lora_path=f"{shelf}/../x").status_code == 400
    assert running.client.completions.create(model="mine", prompt="a", max_tokens=2).choices
    assert post("unload", lora_name="mine").status_code == 200
    assert post("unload", lora_name="mine").status_code == 404
    closed = Running(ServeEngine(open_model(base), "t", ServeConfig(pool_pages=900)), ServerOptions(KEY))
    found = closed.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    closed.stop()
    assert (found.status_code, "--allow-runtime-lora" in found.text) == (403, True)


def test_a_client_that_goes_ends_its_request(running):
    engine = running.serve.engine
    body = {"model": "small", "prompt": "abc", "max_tokens": 480, "stream": True, "ignore_eos": True}
    with running.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/completions", json=body | {"stream": False}, timeout=0.3,
                   headers={"Authorization": f"Bearer {KEY}"})  # fmt: skip
    until = time.monotonic() + 10
    while not engine.idle and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.idle
    assert engine.metrics.counters["request_success_total", (("finished_reason", "cancelled"),)] >= 2


def test_metrics_are_counted(running):
    found = running.http.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info",
                 "resident_adapters", 'pool_pages{model_name="tiny",kind="kv"}', "prompt_tokens_total",
                 "generation_tokens_total", "time_to_first_token_seconds_bucket",
                 "e2e_request_latency_seconds_sum"):  # fmt: skip
        assert f"studio:{name}" in found
    for line in found.splitlines():
        assert line.startswith("# TYPE studio:") or float(line.rsplit(" ", 1)[1]) >= 0


def test_a_server_that_is_full_or_late_says_when_to_come_back(base):
    serve = ServeEngine(open_model(base), "tiny", ServeConfig(pool_pages=2100, max_running=1, max_waiting=1,
                                                              scheduler="early-abort", slo=0.8))  # fmt: skip
    server = Running(serve, ServerOptions(KEY))
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as going:
        lines = going.iter_lines()
        next(lines)

        def second() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}, timeout=30,
                              headers={"Authorization": f"Bearer {KEY}"})  # fmt: skip

        found: list[httpx.Response] = []
        waits = threading.Thread(target=lambda: found.append(second()))
        waits.start()
        until = time.monotonic() + 5
        while not serve.engine.waiting and time.monotonic() < until:
            time.sleep(0.005)
        full = second()
        waits.join(20)
    server.stop()
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert (found[0].status_code, found[0].headers["retry-after"]) == (503, "1")


def test_a_peft_model_is_served_with_all_its_adapters(base):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(plain, config, adapter_name="one").eval()
    model.add_adapter("two", config)
    ids, wanted = [10, 20, 30], []
    for name in ("one", "two"):
        model.set_adapter(name)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            made = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 3).long(),
                                  max_new_tokens=6, do_sample=False, pad_token_id=0)  # fmt: skip
        wanted.append(tuple(made[0, 3:].tolist()))
    serve = ServeEngine.from_peft(model, AutoTokenizer.from_pretrained(base), ServeConfig(pool_pages=3000))
    how = Sampling(max_tokens=6, ignore_eos=True)
    found = serve.generate([ids, ids, ids], ["one", "two", {"one": 0.5, "two": 0.5}], how)
    assert [one.tokens for one in found[:2]] == wanted
    with pytest.raises(InputError, match="3 prompts but 2 adapters"):
        serve.generate([ids] * 3, ["one", "two"])
    serve.start()

    async def streamed() -> str:
        return "".join([piece.text async for piece in serve.stream(ids, "two", how)])

    assert run(streamed()) == found[1].text
    serve.close()
    assert json.dumps(serve.stats())
