"""``studio inspect experts``: which expert of a mixture takes which tokens, by group of rows; numbers and picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

from adapters.errors import InputError
from adapters.layers.experts import expert_layers
from adapters.layers.experts.presets import preset
from adapters.layers.experts.usage import LEFT_OUT, own_tokens, usage
from studio.cli.app import run as command
from studio.inspection import experts
from studio.training.tasks.language import run
from tests.language.conftest import settings, write_rows


def mixture(bases, method: str, **more):
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases("llama")), preset(method, r=2, **more)).eval()
    for layer in expert_layers(model).values():
        for router in layer.moeadapter_router.values():
            torch.nn.init.normal_(router.weight)
    return model


def by_hand(model, ids: torch.Tensor, path: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, N) weights and (B, T) entropies of one router, from its input alone."""
    layer, given = expert_layers(model)[path], []
    hook = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(input_ids=ids)
    hook.remove()
    p = (given[0] @ layer.moeadapter_router["default"].weight.T).softmax(-1)
    weights = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1 / k) if k < p.shape[-1] else p
    return weights, -(p * p.log()).sum(-1) / math.log(p.shape[-1])


@pytest.mark.parametrize(("method", "k"), [("mixlora", 2), ("loramoe", 6), ("mola", 2)])
@torch.no_grad()
def test_loads_and_entropies_are_those_of_the_routers(method, k, bases):
    model = mixture(bases, method, **({"num_experts": 3} if method == "mola" else {}))
    ids = torch.randint(6, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    group = torch.tensor([[0], [1], [1]]).expand(3, 7).clone()
    group[2, 4:] = LEFT_OUT
    batches = [({"input_ids": ids[:2]}, group[:2]), ({"input_ids": ids[2:]}, group[2:])]
    found = usage(model, batches, ["one", "two", "none"])
    assert len(found) == {"mixlora": 2, "loramoe": 6, "mola": 14}[method]
    for one in found[:: len(found) - 1]:
        weights, entropies = by_hand(model, ids, one.module, k)
        for number, name in enumerate(("one", "two")):
            own = group == number
            torch.testing.assert_close(torch.tensor(one.groups[name]), weights[own].mean(0), atol=1e-5, rtol=0)
            assert one.entropies[name] == pytest.approx(float(entropies[own].mean()), abs=1e-5)
        assert "none" not in one.groups
        counted = weights[group != LEFT_OUT]
        torch.testing.assert_close(torch.tensor(one.load), counted.mean(0), atol=1e-5, rtol=0)
        assert one.busiest == pytest.approx(float(counted.mean(0).max()) * len(one.load), abs=1e-4)
        distance = (torch.tensor(one.groups["one"]) - torch.tensor(one.groups["two"])).abs().sum() / 2
        assert one.apart == pytest.approx(float(distance), abs=1e-5)


def test_tokens_of_an_expert_are_its_own_and_not_just_frequent():
    ids = torch.tensor([1] * 50 + [2] * 20 + [3] * 20 + [4])
    first = torch.tensor([0.5] * 50 + [1.0] * 20 + [0.0] * 20 + [1.0])
    assert own_tokens(ids, torch.stack([first, 1 - first], 1), 2) == ((2, 4), (3, 1))


def test_a_model_without_routers(bases):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases("llama")), preset("mola", r=2, num_experts=1))
    ids = torch.full((1, 3), 9)
    with pytest.raises(InputError, match="no router"):
        usage(model, [({"input_ids": ids}, torch.zeros(1, 3, dtype=torch.long))], ["all"])
    with pytest.raises(InputError, match="no token"):
        usage(model, [({"input_ids": ids}, torch.full((1, 3), LEFT_OUT))], ["all"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    found = [{"prompt": f"{word}?", "completion": word[::-1], "task": task}
             for task, words in (("colours", ("red", "blue", "green")), ("numbers", ("one", "two", "three")))
             for word in words]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("typed") / "typed.jsonl", found)


def test_the_command_tells_groups_apart_and_draws_them(bases, chats, rows, tmp_path, capsys):
    trained = run(settings(bases("llama"), chats, steps=1, method="mixlora", experts="4"), tmp_path)["adapter"]
    plot = tmp_path / "routing.png"
    asked = ["inspect", "experts", str(trained), "--base", str(bases("llama"))]
    assert command([*asked, "--data", str(rows), "--by", "task", "--plot", str(plot), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["groups"]) == ["colours", "numbers"]
    assert report["experts"] == ["1", "2", "3", "4"]
    assert [router["module"] for router in report["routers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(sum(router["groups"]["colours"]) == pytest.approx(1) for router in report["routers"])
    with Image.open(plot) as drawn:
        dark = drawn.convert("L").crop((experts.LEFT, experts.TOP, drawn.width, drawn.height))
        assert min(dark.getdata()) < 120

    assert command(asked) == 0  # the rows that it was trained on, as the recipe names them
    told = capsys.readouterr().out
    assert "model.layers.1.mlp" in told
    assert "chats (%)" in told
    assert command([*asked, "--data", str(rows), "--by", "tsk"]) == 2
    assert "no column 'tsk' (did you mean 'task'?)" in " ".join(capsys.readouterr().err.split())
    plain = run(settings(bases("llama"), chats, steps=1), tmp_path / "plain")["adapter"]
    assert command(["inspect", "experts", str(plain)]) == 2
    assert "not a mixture of experts" in " ".join(capsys.readouterr().err.split())


def test_files_of_one_name_are_groups_of_their_own(tmp_path):
    def groups(*names: str) -> list[str]:
        files = []
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            files.append(str(tmp_path / name))
            if name.endswith(".jsonl"):
                write_rows(tmp_path / name, [{"text": name}])
            else:
                (tmp_path / name).write_text(f"text\n{name}\n")
        found = experts._Rows.of(files, "", 8, lambda report: report.rows)
        assert [found.groups[number] for number in found.group] == found.groups
        return found.groups

    assert groups("a/rows.jsonl", "b/other.jsonl") == ["rows", "other"]
    assert groups("a/rows.jsonl", "a/rows.csv") == ["rows.jsonl", "rows.csv"]
    assert groups("a/rows.jsonl", "b/rows.jsonl") == ["a/rows.jsonl", "b/rows.jsonl"]
    with pytest.raises(InputError, match=r"rows.jsonl' is named twice"):
        groups("a/rows.jsonl", "a/rows.jsonl")


def test_experts_of_an_x_lora_have_their_names(bases, chats, tmp_path):
    for number, name in enumerate(("law", "code")):
        run(settings(bases("llama"), chats, steps=1, name=name, seed=number), tmp_path / name)
    named = ",".join(str(tmp_path / name / name) for name in ("law", "code"))
    for layerwise in (False, True):
        config = settings(bases("llama"), chats, steps=1, method="x-lora", experts=named, xlora_layerwise=layerwise)
        team = run(config, tmp_path / f"team{layerwise}")["adapter"]
        report = experts.experts(str(team), [str(chats)], str(bases("llama")))
        assert report.experts == ["law", "code"]
        assert len(report.routers) == (14 if layerwise else 1)
        assert report.routers[0]["module"] == ("model.layers.0.self_attn.q_proj" if layerwise else "")
        assert sum(report.routers[-1]["load"]) == pytest.approx(1)
