"""``studio serve``: the process from end to end, and configurations for other engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from adapters.errors import InputError
from studio.cli.app import run as command
from studio.serving import export
from studio.serving.address import listening, names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shelf(several, tmp_path) -> Path:
    folder = tmp_path / "shelf"
    for name in ("small", "large"):
        shutil.copytree(several[name], folder / name)
    return folder


def test_a_configuration_for_vllm_names_every_adapter(base, shelf, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(["serve", str(base), "--adapters", str(shelf), "--export", "vllm", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "vLLM" in told["checked"]
    config = yaml.safe_load((out / "vllm.yaml").read_text())
    assert config["max-lora-rank"] == 8
    assert config["lora-modules"] == [f"{name}={out / 'adapters' / name}" for name in ("large", "small")]
    for name in ("small", "large"):
        kept = load_file(out / "adapters" / name / "adapter_model.safetensors")
        assert kept.keys() == load_file(shelf / name / "adapter_model.safetensors").keys()
    assert export.arguments(config)[:4] == [str(base), "--served-model-name", "llama", "--enable-lora"]


def test_configurations_for_ray_and_kubernetes(base, shelf, tmp_path):
    plan = export.plan(str(base), [shelf], tmp_path / "out", 16, "bf16")
    with pytest.raises(InputError, match="give --storage"):
        export.write("ray", plan)
    made = export.write("ray", plan, "s3://bucket/loras")
    model = yaml.safe_load(made.files[0].read_text())["applications"][0]["args"]["llm_configs"][0]
    assert model["lora_config"]["dynamic_lora_loading_path"] == "s3://bucket/loras"
    assert model["engine_kwargs"]["max_lora_rank"] == 8
    assert model["model_loading_config"]["model_id"] == "llama"
    volume, deployment, service = yaml.safe_load_all(export.write("k8s", plan).files[0].read_text())
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert "small=/models/adapters/small" in container["args"]
    claim = deployment["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == volume["metadata"]["name"]
    with pytest.raises(InputError, match="did you mean 'vllm'"):
        export.write("vlm", plan)


def test_what_vllm_cannot_serve_is_refused_by_name(base, shelf, several, tmp_path, capsys):
    shutil.copytree(several["dora"], shelf / "dora")
    with pytest.raises(InputError, match="'dora' is a DoRA, which vLLM cannot serve"):
        export.plan(str(base), [shelf], tmp_path / "out", 16, "auto")
    shutil.rmtree(shelf / "dora")
    open_to_all = ["serve", str(base), "--adapters", str(shelf), "--backend", "vllm", "--host", "0.0.0.0"]
    assert command(open_to_all) == 2
    assert "--api-key" in capsys.readouterr().err
    assert command(["serve", str(base), "--adapters", str(shelf), "--backend", "vllm"]) == 2
    assert "--export vllm" in capsys.readouterr().err


def test_where_the_server_listens():
    with pytest.raises(InputError, match="--api-key"):
        listening("0.0.0.0", 0, "")
    with pytest.raises(InputError, match="not an address of this computer"):
        listening("no.such.host.invalid", 0, "key")
    taken = listening("127.0.0.1", 0, "")
    taken.listen()
    with pytest.raises(InputError, match="choose another --port"):
        listening("127.0.0.1", taken.getsockname()[1], "")
    taken.close()
    assert names("0.0.0.0", ()) == ("*",)
    assert "example.org" in names("127.0.0.1", ["example.org"])
    assert command(["serve", "x", "--adapters", "/no/such/folder"]) == 2


@pytest.mark.journey
def test_the_command_serves_until_it_is_stopped(base, shelf):
    httpx = pytest.importorskip("httpx")
    server = subprocess.Popen(
        [sys.executable, "-m", "studio", "serve", str(base), "--adapters", str(shelf), "--port", "0", "--json",
         "--pool-gb", "0.01"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ.copy(),
    )  # fmt: skip
    assert server.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        text += server.stdout.readline()
    url = json.loads(text)["url"]
    listed = [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
    assert listed == ["llama", "auto", "large", "small"]
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["model"] == "small"
    assert httpx.post(f"{url}/v1/completions", json=body, headers={"Host": "evil.example"}).status_code == 400
    auto = body | {"model": "auto"}
    assert httpx.post(f"{url}/v1/chat/completions", json=auto, timeout=60).json()["model"] == "llama"
    server.send_signal(signal.SIGINT)
    assert server.wait(30) in (0, -signal.SIGINT, 130)
