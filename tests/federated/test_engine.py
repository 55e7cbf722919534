"""The job: what it exports is what the server combined, it resumes exactly, and bad clients are named."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters.errors import Cancelled, InputError, StudioError
from adapters.federated.state import Options, shares
from adapters.progress import Progress
from studio.federation import client, engine
from studio.federation.clients import check, members
from studio.federation.command import at_home
from studio.federation.messages import Reply, encoded, instruction, size
from studio.federation.partition_table import parts
from studio.federation.server import Server


class Stop:
    """A monitor that asks to stop at a report whose stage holds some words."""

    def __init__(self, words: str = "") -> None:
        self.words, self.stopped = words, False
        self.messages: list[str] = []

    def report(self, progress: Progress) -> None:
        self.messages.append(progress.message)
        self.stopped = self.stopped or (bool(self.words) and self.words in progress.stage)

    def cancelled(self) -> bool:
        return self.stopped


def delta(adapter: str, base: Path) -> dict[str, torch.Tensor]:
    """What PEFT itself adds to every weight of the base."""
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    found = {name: (value - plain[name]).detach() for name, value in merged.named_parameters()}
    return {name: value for name, value in found.items() if bool(value.any())}


def kept_answers(monkeypatch: pytest.MonkeyPatch) -> list[list[Reply]]:
    """The replies of every round, as the server takes them."""
    seen: list[list[Reply]] = []
    take = Server.take

    def watch(self, replies, *rest):
        seen.append(list(replies))
        return take(self, replies, *rest)

    monkeypatch.setattr(Server, "take", watch)
    return seen


@pytest.mark.parametrize("method", ["fedex-lora", "fed-sb"])
def test_the_exported_adapter_is_the_sum_of_what_clients_learnt(federation, llama, tmp_path, monkeypatch, method):
    """After one round W = W0 + s sum_k p_k B_k A_k (FedEx), W0 + sum_k p_k B R_k A (Fed-SB), read by PEFT itself."""
    replies = kept_answers(monkeypatch)
    config = federation(method=method, rounds=1, evaluate_every=0, training={"alpha": 4.0} if method[3] == "e" else {})
    result = engine.run(config, tmp_path)
    found = delta(result["adapter"], llama)
    p = shares([reply.facts["examples"] for reply in replies[0]])
    kept = load_file(tmp_path / "server" / "tensors.safetensors")
    for name, change in found.items():
        layer = f"model.{name.removesuffix('.weight')}"
        if method == "fed-sb":
            A, B = (kept[f"fixed/{layer}.lora_{letter}"] for letter in "AB")
            learnt = [B @ reply.tensors[f"{layer}.lora_R"] @ A for reply in replies[0]]
        else:
            learnt = [2 * reply.tensors[f"{layer}.lora_B"] @ reply.tensors[f"{layer}.lora_A"] for reply in replies[0]]
        wanted = sum(share * one for share, one in zip(p, learnt, strict=True))
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-6)
    assert len(found) == 14
    recipe = client.recipe_of(Path(result["adapter"]))
    told = recipe["training"]["federated"]
    assert told["method"] == method
    assert told["rounds"] == 1
    assert told["clients"] == 3
    assert [int(reply.facts["examples"]) for reply in replies[0]] == [6, 8, 4]
    up = sum(size(reply.tensors) for reply in replies[0])
    assert result["bytes"]["up"] == up == told["bytes"]["up"]
    if method == "fed-sb":
        assert up == 3 * 14 * 4 * 2**2


def test_a_stopped_run_goes_on_to_the_same_adapter(federation, tmp_path):
    config = federation(method="fedex-lora")
    config = config.model_copy(update={"clients": config.clients[:2]})
    whole = engine.run(config, tmp_path / "whole")
    with pytest.raises(Cancelled, match=r"round 2 of 2.*resumed"):
        engine.run(config, tmp_path / "parts", Stop("round 2, south: training"))
    assert [line["number"] for line in engine.read_history(tmp_path / "parts")] == [0, 1]
    watch = Stop()
    resumed = engine.run(config, tmp_path / "parts", watch, resume=True)
    first, second = (load_file(Path(r["adapter"]) / "adapter_model.safetensors") for r in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["measures"] == resumed["measures"]
    assert whole["bytes"] == resumed["bytes"]
    last = engine.read_history(tmp_path / "parts")[-1]
    assert set(last["measured"]) == {"north", "south"}
    assert last["bias"] == 0.0
    assert math.isfinite(resumed["measures"]["validation_loss"])
    with pytest.raises(InputError, match="other settings \\(method\\)"):
        engine.run(config.model_copy(update={"method": "fedit"}), tmp_path / "parts", resume=True)


# ------------------------------------------------------------------------------------------------ without a training


def replies(names="abc", **wrong):
    """Good replies of clients with one layer; ``wrong`` replaces the tensors or facts of some."""
    made = []
    for number, name in enumerate(names):
        g = torch.Generator().manual_seed(number)
        tensors = {"m.lora_A": torch.randn(2, 5, generator=g), "m.lora_B": torch.randn(4, 2, generator=g)}
        facts = {"examples": 10 * (number + 1), "base": "w0", "measures": {"loss": 1.0}}
        tensors, facts = wrong.get(name, (tensors, facts))
        made.append(Reply(name, tensors, facts=facts))
    return made


@pytest.fixture
def server(federation):
    made = Server(federation(), ["a", "b", "c"])
    first = replies("a")[0]
    made.begin(Reply("a", first.tensors, facts={**first.facts, "scales": {"m": 1.0}}), [])
    return made


def test_a_client_that_cannot_be_used_is_named_and_left_out(server):
    good = replies()
    bad = {
        "not finite": ({**good[1].tensors, "m.lora_B": torch.full((4, 2), math.nan)}, good[1].facts),
        "sent no 'm.lora_B'": ({"m.lora_A": good[1].tensors["m.lora_A"]}, good[1].facts),
        "another base": (good[1].tensors, {**good[1].facts, "base": "w1"}),
        "no examples": (good[1].tensors, {**good[1].facts, "examples": 0}),
        "loss that is not finite": (good[1].tensors, {**good[1].facts, "measures": {"loss": math.inf}}),
        "cannot be read": (good[1].tensors, {"examples": 20, "base": "w0"}),
    }
    for number, (words, wrong) in enumerate(bad.items(), 1):
        record = server.take(replies(b=wrong), {})
        assert words in record.failed["b"]
        assert set(record.clients) == {"a", "c"}
        assert record.number == number
        wanted = (10 * good[0].tensors["m.lora_B"] + 30 * good[2].tensors["m.lora_B"]) / 40
        torch.testing.assert_close(server.tensors["m.lora_B"], wanted)
    one, other = Server(server.config, server.names), Server(server.config, server.names)
    for made, answers in ((one, replies()), (other, replies()[::-1])):  # whoever is first
        made.base = "w0"
        made.take(answers, {})
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    record = server.take(replies("ac"), {"b": "did not answer"})
    assert record.failed == {"b": "did not answer"}
    before = dict(server.tensors)
    with pytest.raises(StudioError, match=r"1 usable answers, but needs 2 \(b: died; c: died\).*min_clients"):
        server.take(replies("a"), {"b": "died", "c": "died"})
    assert server.tensors == before
    assert server.done == record.number


STARTS = {
    "sent no 'm.lora_B'": {"tensors": {"m.lora_A": torch.ones(2, 5)}},
    "of shape (2, 6), not (2, 5)": {"tensors": {"m.lora_A": torch.ones(2, 6), "m.lora_B": torch.zeros(4, 2)}},
    "of shape (4, 3), not (4, 2)": {"tensors": {"m.lora_A": torch.ones(2, 5), "m.lora_B": torch.zeros(4, 3)}},
    "not finite in 'm.lora_A'": {"tensors": {"m.lora_A": torch.full((2, 5), math.nan), "m.lora_B": torch.zeros(4, 2)}},
    "not finite in 'head'": {"tensors": {"head": torch.tensor([math.inf])}},
    "as torch.int64": {"tensors": {"head": torch.tensor([1])}},
    "'z.lora_A' (did you mean 'm.lora_A'?), which was not asked for": {"tensors": {"z.lora_A": torch.ones(2, 5)}},
    "'m.lora_A', which was not asked": {"fixed": {"m.lora_A": torch.ones(2, 5)}},
    "names no layer": {"scales": {}},
    "the scale nan": {"scales": {"m": math.nan}},
    "cannot be read": {"scales": 3},
    "which base": {"base": ""},
}


@pytest.mark.parametrize("words", STARTS)
def test_a_start_that_cannot_be_trained_is_refused(federation, words):
    """The first round's tensors come from a client, too."""
    wrong = STARTS[words]
    pair = {"m.lora_A": torch.ones(2, 5), "m.lora_B": torch.zeros(4, 2), "head": torch.zeros(3)}
    tensors = wrong.get("tensors", pair)
    tensors = tensors if "m.lora_A" in tensors else {**pair, **tensors}
    facts = {"base": wrong.get("base", "w0"), "scales": wrong.get("scales", {"m": 2.0}), "inputs": {"m": [5]}}
    server = Server(federation(), ["a", "b", "c"])
    with pytest.raises(InputError, match=f"^(The client 'a'|A client's start).*{re.escape(words)}"):
        server.begin(Reply("a", tensors, wrong.get("fixed", {}), facts), [])
    assert not server.started
    assert not server.tensors
    server.begin(Reply("a", pair, facts={"base": "w0", "scales": {"m": 2.0}, "inputs": {"m": [5]}}), [])
    assert server.started


def test_gradients_that_cannot_be_summed_are_refused_with_their_client(federation):
    facts = {"base": "w0", "scales": {"m": 1.0}, "inputs": {"m": [5]}}
    good = Reply("a", {"m": torch.randn(4, 5, generator=torch.Generator().manual_seed(0))}, facts={"base": "w0"})
    bad = {
        "'b' sent no 'm'": {},
        "'b' sent 'n'": {"m": good.tensors["m"], "n": good.tensors["m"]},
        "'b' sent 'm' of shape (5, 4)": {"m": good.tensors["m"].T},
        "'b' sent numbers that are not finite": {"m": torch.full((4, 5), math.inf)},
    }
    server = Server(federation(method="fed-sb"), ["a", "b", "c"])
    for words, tensors in bad.items():
        with pytest.raises(InputError, match=re.escape(words)):
            server.begin(Reply("a", facts=facts), [good, Reply("b", tensors, facts={"base": "w0"})])
    with pytest.raises(InputError, match="'b' measured another base"):
        server.begin(Reply("a", facts=facts), [good, replace(good, client="b", facts={"base": "w1"})])
    with pytest.raises(InputError, match="cannot be read"):
        server.begin(Reply("a", facts=facts), [replace(good, facts={})])
    assert not server.started
    server.begin(Reply("a", facts=facts), [good, replace(good, client="b")])
    assert server.fixed["m.lora_A"].shape == (2, 5)


def test_state_survives_and_messages_come_apart_again(server, tmp_path):
    server = Server(server.config.model_copy(update={"method": "fedex-lora"}), server.names)
    first = replies("a")[0]
    server.begin(Reply("a", first.tensors, facts={**first.facts, "scales": {"m": 1.0}}), [])
    server.take(replies(), {})
    server.take(replies("ab"), {"c": "late"})
    server.save(tmp_path)
    again = Server.load(server.config, server.names, tmp_path)
    assert again.known == server.known == {"a": (True, 1), "b": (True, 1), "c": (True, 0)}
    for name in "abc":
        one, two = (made.instruction(name, "train") for made in (server, again))
        assert len(one.residual) == (2 if name == "c" else 1)
        flat = one.flat()
        back = instruction("train", one.round, flat, one.facts)
        assert len(encoded(flat, one.facts)) > size(flat) == size(two.flat()) == size(back.flat())
        assert all(torch.equal(flat[key], back.flat()[key]) and torch.equal(flat[key], two.flat()[key]) for key in flat)
    # the client that was late adds up the same product as the others
    memories = {name: client.Memory() for name in "ac"}
    message = server.instruction("c", "train")
    memories["c"].take(message)
    memories["a"].take(replace(message, residual=message.residual[:1], facts={**message.facts, "number": 1}))
    memories["a"].take(replace(message, residual=message.residual[1:]))
    left, right = ([m.residual["m"][i] for m in memories.values()] for i in (0, 1))
    torch.testing.assert_close(left[0] @ right[0], left[1] @ right[1])
    memories["c"].save(tmp_path)
    kept = client.Memory.load(tmp_path)
    assert kept.number == 2
    assert torch.equal(kept.residual["m"][0], left[1])
    with pytest.raises(InputError, match="misses what was added"):
        client.Memory().take(replace(message, residual=[]))
    with pytest.raises(InputError, match="frozen factors are not"):
        client.Memory().take(replace(message, fixed={"m.lora_A": torch.ones(2, 5)}, facts={"digest": "other"}))


def test_sums_of_products_never_outgrow_the_layer():
    g = torch.Generator().manual_seed(0)
    total, dense = None, torch.zeros(6, 5)
    for _ in range(4):
        product = torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
        total, dense = client.added(total, product), dense + product[0] @ product[1]
    assert total[0].shape[1] <= 5
    torch.testing.assert_close(total[0] @ total[1], dense)


def test_every_rule_learns_a_regression_that_averages_of_factors_get_wrong():
    """Clients of y = W x with inputs of their own; all rules come near the optimum, by gradient steps on A and B."""
    from adapters.federated.facts import facts, rules
    from adapters.federated.fed_sb import basis

    g = torch.Generator().manual_seed(0)
    goal = torch.randn(6, 2, generator=g) @ torch.randn(2, 5, generator=g)
    inputs = [torch.randn(40, 5, generator=g) * torch.rand(5, generator=g).add(0.3) for _ in range(3)]

    def loss(W, x):
        return (x @ (W - goal).T).square().mean()

    for rule in rules():
        known, W0, fixed, aggregate = facts(rule), torch.zeros(6, 5), {}, rule.load()
        A0 = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        state = {"m.lora_A": A0, "m.lora_B": torch.zeros(6, 2)}
        if known.trains == "B":
            fixed, state = {"m.lora_A": A0}, {"m.lora_B": torch.zeros(6, 2)}
        if known.trains == "R":
            slopes = [torch.autograd.functional.jacobian(lambda W, x=x: loss(W, x), W0) for x in inputs]
            fixed, state = basis([{"m": slope} for slope in slopes], 2, {"m": 1.0}, 0.01)

        def weight(values, W0, fixed=fixed):
            both = {**values, **fixed}
            core = both.get("m.lora_R", torch.eye(2))
            return W0 + both["m.lora_B"] @ core @ both["m.lora_A"]

        for number in range(30):
            answers = []
            for x in inputs:
                own = {name: value.clone().requires_grad_() for name, value in state.items()}
                optimizer = torch.optim.Adam(own.values(), lr=0.03)
                for _ in range(5):
                    optimizer.zero_grad()
                    loss(weight(own, W0), x).backward()
                    optimizer.step()
                answers.append({name: value.detach() for name, value in own.items()})
            made = aggregate(answers, [1.0] * 3, Options())
            for left, right in made.residual.values():
                W0 = W0 + left @ right
            fresh = torch.randn(2, 5, generator=torch.Generator().manual_seed(2 + number))
            state = made.tensors or {"m.lora_A": fresh, "m.lora_B": torch.zeros(6, 2)}
        before = sum(float(loss(torch.zeros(6, 5), x)) for x in inputs)
        after = sum(float(loss(weight(state, W0), x)) for x in inputs)
        # A frozen at random, or a basis from one sign matrix, cannot reach the goal: the best in it is much nearer
        assert after < (0.05 if known.trains == "A and B" else 0.8) * before, (rule.name, after / before)


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_configurations_say_what_to_do(federation, rows, tmp_path):
    refused = {
        "fedit": ({"method": "fedavg"}, "method"),
        "rounds": ({"rounds": 0}, "rounds"),
        "nobody": ({"clients": []}, "name clients with their data"),
        "both": ({"data": str(rows[0])}, "not from both"),
        "twice": ({"clients": [{"name": "a", "data": "x"}, {"name": "A", "data": "y"}]}, "same name"),
        "secure": ({"method": "lora-fair", "secure_aggregation": True}, "fed-sb, fedit, ffa-lora"),
        "two": (
            {"secure_aggregation": True, "clients": [{"name": n, "data": "x"} for n in "ab"]},
            "secure aggregation needs three clients",
        ),
        "ranks": ({"clients": [{"name": "a", "data": "x", "rank": 2}]}, "flora and flexlora only"),
        "seed": ({"training": {"seed": 1}}, "the federation sets"),
        "private": ({"method": "fed-sb", "privacy": "sample"}, "public_calibration"),
        "delta": ({"privacy": "sample", "delta": 1.0}, "delta"),
        "epsilon": ({"privacy": "sample", "target_epsilon": 0}, "target_epsilon"),
        "lambda": ({"method": "lora-fair", "strength": -1}, "strength"),
        "by": ({"clients": [], "data": str(rows[0]), "partition": "dirichlet"}, "set by"),
    }
    for changes, words in refused.values():
        with pytest.raises(InputError, match=words):
            federation(**changes)
    for training, words in (
        ({"use_dora": True}, "use_dora"), ({"freeze_a": True}, "ffa-lora"), ({"init": "pissa"}, "init"),
        ({"validation_split": 0.1}, "test file"), ({"rnak": 2}, "client 'north'|rnak"), ({"ema": True}, "ema"),
        ({"s2_share": "shape"}, "s2_share"), ({"adalora_rank": 2}, "adalora_rank"), ({"l4q_bits": 4}, "l4q_bits"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check(federation(training=training))
    missing = [{"name": "a", "data": str(tmp_path / "none.jsonl")}]
    with pytest.raises(InputError, match=r"client 'a': .*none.jsonl"):
        check(federation(clients=missing))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"client 'a': .*holds no rows"):
        check(federation(clients=[{"name": "a", "data": str(empty)}]))


def test_secure_aggregation_is_not_passed_over_in_one_process(federation, tmp_path):
    config = federation(secure_aggregation=True)
    for act in (check, lambda config: engine.run(config, tmp_path / "run")):
        with pytest.raises(InputError, match="secure_aggregation cannot be had in one process"):
            act(config)
    assert not (tmp_path / "run").exists()


def test_rows_are_divided_as_asked(federation, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [
        {"text": f"t{n}", "label": "abc"[n % 3], "source": "xy"[n % 2], "kin": str(n // 6)} for n in range(60)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def divided(**changes):
        config = federation(clients=[], data=str(file), **changes)
        made = members(config, tmp_path / "run")

        def read(place):
            return [json.loads(line) for line in Path(place).read_text().splitlines()]

        shown = {member.name: read(member.data) for member in made}
        tested = {member.name: read(member.test) for member in made if member.test}
        assert [(part.rows, part.tested) for part in parts(config)] == [
            (len(shown[name]), len(tested.get(name, []))) for name in shown
        ]
        everything = sorted(row["text"] for some in (*shown.values(), *tested.values()) for row in some)
        assert everything == sorted(line["text"] for line in lines)
        return shown, tested

    shown, tested = divided(count=3)
    assert [len(part) for part in shown.values()] == [16] * 3
    assert [len(part) for part in tested.values()] == [4] * 3
    shown, _ = divided(partition="column", by="source")
    assert {name: {row["source"] for row in part} for name, part in shown.items()} == {"x": {"x"}, "y": {"y"}}
    shown, tested = divided(partition="column", by="source", test_by="kin")
    kin = [{row["kin"] for part in some.values() for row in part} for some in (shown, tested)]
    assert not kin[0] & kin[1]
    assert len(kin[1]) == 2
    shown, _ = divided(partition="severe", by="label", count=3, test_share=0)
    assert all(sum(row["label"] == "abc"[n] for row in part) == 19 for n, part in enumerate(shown.values()))
    divided(partition="dirichlet", by="label", count=2, concentration=5.0)
    with pytest.raises(InputError, match="has no rows to train on"):
        divided(count=61)
    with pytest.raises(InputError, match="no 'domain' in row 1: its columns are text"):
        divided(partition="column", by="domain")


def test_paths_in_a_file_are_the_files_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    made = at_home({"clients": [{"name": "a", "data": "a.jsonl", "test": "b.jsonl"}]}, tmp_path)
    assert made["clients"] == [{"name": "a", "data": str(tmp_path / "a.jsonl"), "test": "b.jsonl"}]
