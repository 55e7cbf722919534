"""The deployment's parts: certificates, checks before anything starts, and Flower's messages against the engine.

Flower lives in an environment of its own; where it is missing, its tests say so. The whole with real processes is
marked slow.
"""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from adapters.errors import InputError, StudioError
from studio.federation import engine, export
from studio.federation.flower import certificates, launch
from studio.federation.schema import FederateConfig
from studio.federation.server import Server

HAS_FLOWER = "flwr is not installed here: it needs an environment of its own (extra federated)"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_certificates_are_kept_checked_and_private(tmp_path):
    pytest.importorskip("cryptography")
    made = certificates.make(tmp_path, ["127.0.0.1", "server.example.org"], ["north"])
    assert {file.name for file in made} == {"authority.crt", "server.crt", "server.key", "north.key", "north.pub"}
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in ("server.key", "north.key"))
    assert (tmp_path / "north.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    before = (tmp_path / "server.crt").read_bytes()
    assert [file.name for file in certificates.make(tmp_path, ["127.0.0.1"], ["north", "south"])] == [
        "south.key", "south.pub",
    ]  # fmt: skip
    assert (tmp_path / "server.crt").read_bytes() == before
    with pytest.raises(InputError, match=r"is for .*127.0.0.1, not for 'other'"):
        certificates.make(tmp_path, ["other"], [])
    launch.check_certificates(tmp_path, "server.example.org", ["north"])
    with pytest.raises(InputError, match="not for 'elsewhere'"):
        launch.check_certificates(tmp_path, "elsewhere", ["north"])
    with pytest.raises(InputError, match=r"west.pub' is missing: make it with"):
        launch.check_certificates(tmp_path, "127.0.0.1", ["west"])
    checked = subprocess.run(
        ["openssl", "verify", "-CAfile", "authority.crt", "server.crt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert checked.stdout.strip() == "server.crt: OK", checked.stderr


def test_a_deployment_is_refused_before_it_starts(federation, rows, tmp_path):
    with pytest.raises(InputError, match="name clients instead of one data file"):
        launch.check_deployable(federation(clients=[], data=str(rows[0])))
    with pytest.raises(InputError, match="public_data is for runs in one process"):
        launch.check_deployable(federation(method="fed-sb", public_data="x"))
    with pytest.raises(InputError, match="secure_aggregation is not built"):
        launch.check_deployable(federation(secure_aggregation=True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot be used .*choose another one"):
            launch.check_free("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("method", ["flora", "fed-sb"])
def test_the_server_alone_writes_the_engines_adapter(federation, tmp_path, method):
    """Without model and data, from the state only."""
    config = federation(method=method, rounds=1, evaluate_every=0)
    result = engine.run(config, tmp_path / "run")
    state = Server.load(config, [client.name for client in config.clients], tmp_path / "run")
    place = export.write(state, tmp_path / "alone", engine.facts(state))
    wanted, found = (load_file(Path(p) / "adapter_model.safetensors") for p in (result["adapter"], place))
    scales = [json.loads((Path(p) / "adapter_config.json").read_text()) for p in (result["adapter"], place)]

    def deltas(weights, settings):
        names = {name.rsplit(".lora_", 1)[0] for name in weights}
        scale = settings["lora_alpha"] / settings["r"]
        assert not settings.get("alpha_pattern")
        return {name: scale * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] for name in names}

    first, second = (deltas(w, s) for w, s in zip((wanted, found), scales, strict=True))
    assert first.keys() == second.keys()
    for name, delta in first.items():
        torch.testing.assert_close(second[name], delta, rtol=1e-4, atol=1e-7)


def test_flowers_strategy_ends_where_the_engine_does(federation, tmp_path):
    """The same rounds through Flower's own messages and apps, without a network; one client fails in round 1."""
    pytest.importorskip("flwr", reason=HAS_FLOWER)
    from flwr.app import Context, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from studio.federation.flower import apps, records
    from studio.federation.flower.strategy import RuleStrategy, start

    config = federation(method="fedex-lora", evaluate_every=0)
    file = tmp_path / "federation.yaml"
    file.write_text(config.to_yaml())
    engine.run(config, tmp_path / "engine")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    class Here(Grid):
        """Calls the client app for each message, as nodes would."""

        run = SimpleNamespace(run_id=1)

        def __init__(self):
            self.contexts = {
                number: Context(
                    run_id=1, node_id=number, state=RecordDict(), run_config={},
                    node_config={"client": one.name, "config": str(file), "folder": str(tmp_path / one.name)},
                )
                for number, one in enumerate(config.clients, 10)
            }  # fmt: skip

        def set_run(self, run):
            raise NotImplementedError

        def create_message(self, *args, **options):
            raise NotImplementedError

        def push_messages(self, messages):
            raise NotImplementedError

        def pull_messages(self, message_ids):
            raise NotImplementedError

        def get_node_ids(self):
            return list(self.contexts)

        def send_and_receive(self, messages, *, timeout=None):
            answers = []
            for message in messages:
                node = message.metadata.dst_node_id
                given = copy.deepcopy(message)
                given.metadata.__dict__["_message_id"] = f"m{node}"
                TaskIdentity.node_id = node
                answers.append(apps.client(given, self.contexts[node]))
            TaskIdentity.node_id = 1
            return answers

    server = Server(config, [client.name for client in config.clients])
    start(RuleStrategy(server, tmp_path / "flower", 5.0), Here())
    other = Server.load(config, server.names, tmp_path / "engine")
    assert server.done == 2
    assert server.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(server.tensors[name], other.tensors[name]) for name in other.tensors)
    assert [one.up for one in server.rounds[1:]] == [one.up for one in other.rounds[1:]]
    assert [one.down for one in server.rounds[1:]] == [one.down for one in other.rounds[1:]]
    # a client whose file differs is named, and so is the key
    changed = FederateConfig.parse({**config.model_dump(), "rounds": 9})
    with pytest.raises(InputError, match="differs from the server's in rounds"):
        apps.check_same(records.shared(changed), records.shared(config))
    with pytest.raises(records.ClientError, match="disk is full"):
        records.reply_of(SimpleNamespace(has_error=lambda: False, content=records.refused("a", "disk is full")))
    with pytest.raises(StudioError, match="3 clients are needed, but there is only: nobody"):
        RuleStrategy(Server(config, server.names), tmp_path, 0.0).connected(SimpleNamespace(get_node_ids=list))


def test_a_clients_name_belongs_to_its_key_or_else_to_the_first_node(federation, tmp_path, capsys):
    pytest.importorskip("flwr", reason=HAS_FLOWER)
    from studio.federation.flower.strategy import RuleStrategy

    server = Server(config := federation(), [client.name for client in config.clients])

    class Nodes:
        """Nodes that only say their names."""

        def __init__(self, **said):
            self.said = {int(number[1:]): name for number, name in said.items()}

        def get_node_ids(self):
            return list(self.said)

        def send_and_receive(self, messages, *, timeout=None):
            nodes = [message.metadata.dst_node_id for message in messages]
            return [
                SimpleNamespace(
                    has_error=lambda: False, metadata=SimpleNamespace(src_node_id=node),
                    content={"config": {"told": json.dumps({"client": self.said[node], "facts": {}})}},
                ) for node in nodes
            ]  # fmt: skip

    first, second, third = server.names
    keyed = RuleStrategy(server, tmp_path, 0.0, {first: 2, second: 3, third: 4})
    with pytest.raises(StudioError, match=f"only: {second}. Node 1 was refused: .*'{first}', whose key it does not"):
        keyed.connected(Nodes(n1=first, n3=second))
    assert "Node 1 was refused" in capsys.readouterr().out
    everyone = Nodes(n1=first, n2=first, n3=second, n4=third)
    assert keyed.connected(everyone) == {2: first, 3: second, 4: third}
    with pytest.raises(StudioError, match="Node 1 was refused"):  # the name stays its owner's while that is away
        keyed.connected(Nodes(n1=first, n3=second))

    unkeyed = RuleStrategy(server, tmp_path, 0.0)
    assert unkeyed.connected(everyone) == {1: first, 3: second, 4: third}
    assert "another node takes part already" in capsys.readouterr().out
    assert unkeyed.connected(Nodes(n2=first, n3=second, n4=third)) == {2: first, 3: second, 4: third}


def test_flowers_answer_tells_the_node_of_a_key():
    assert launch.registered('{\n  "success": true,\n  "node-id": 1234567890123\n}\n', "north") == 1234567890123
    with pytest.raises(StudioError, match="which node the key of 'north' has: Error: no such connection"):
        launch.registered("Error: no such connection\n", "north")


@pytest.mark.slow
def test_real_processes_with_tls_and_keys(federation, tmp_path):
    """Server and two clients as processes; a client whose key is not registered is turned away."""
    pytest.importorskip("flwr", reason=HAS_FLOWER)
    config = federation(rounds=1, evaluate_every=0)
    config = config.model_copy(update={"clients": config.clients[:2]})
    file, secrets, ports = tmp_path / "federation.yaml", tmp_path / "secrets", [free_port() for _ in range(4)]
    file.write_text(config.to_yaml())
    certificates.make(secrets, ["127.0.0.1"], ["north", "south"])
    certificates.make(tmp_path / "strange", ["127.0.0.1"], ["north"])
    (tmp_path / "strange/authority.crt").write_bytes((secrets / "authority.crt").read_bytes())

    def command(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "studio", "federate", *words])

    def client(name: str, port: int, keys: Path, folder: str = "") -> subprocess.Popen[bytes]:
        return command("client", name, str(file), "--folder", str(tmp_path / (folder or name)), "--server",
                       f"127.0.0.1:{ports[0]}", "--certificates", str(keys), "--port", str(port))  # fmt: skip

    server = command("server", str(file), "--folder", str(tmp_path / "run"), "--certificates", str(secrets), "--host",
                     "127.0.0.1", "--port", str(ports[0]), "--patience", "300", "--json")  # fmt: skip
    there: list[subprocess.Popen[bytes]] = []
    try:
        time.sleep(40)
        stranger = client("north", ports[3], tmp_path / "strange", "stranger")
        assert stranger.wait(400) != 0
        there = [client("north", ports[1], secrets), client("south", ports[2], secrets)]
        assert server.wait(400) == 0
    finally:
        for process in (*there, server):
            process.terminate()
        for process in (*there, server):
            process.wait(60)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["rounds"] == 1
    assert (Path(result["adapter"]) / "adapter_model.safetensors").is_file()
