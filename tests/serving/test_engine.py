"""The engine: any mix of adapters in one batch gives every request what it gets by itself."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import adapters.layers.experts  # noqa: F401  PEFT knows the mixtures' type
from adapters.errors import FamilyError, InputError
from adapters.layers.experts.presets import preset
from pipelines.language.adapters import AdaptedModel
from pipelines.language.loading import open_model
from pipelines.language.paged import PagedModel, shape_of
from pipelines.language.tokens import Sampling, TextStream, nucleus, penalised
from studio.serving.adapters import Adapters, UnknownModelError
from studio.serving.engine import Engine, QueueFullError, ServeConfig
from studio.serving.requests import Piece, Request
from studio.serving.schedulers import scheduler
from studio.serving.service import ServeEngine
from tests.language import tiny


def served(base: Path, folder: Path | None = None, **config: object) -> tuple[Engine, Adapters]:
    engine = Engine(open_model(base), ServeConfig(**({"pool_pages": 4000} | config)))
    return engine, Adapters(engine, "base-model", (folder,) if folder else ())


def asked(engine: Engine, names: Adapters, ids: list[int], weights: dict[str, float], **sampling: object) -> Request:
    """A submitted request; its pieces are in ``request.pieces``."""
    mix = names.mix(weights)
    pieces: list[Piece] = []
    values = {"max_tokens": 8, "ignore_eos": True} | sampling
    request = Request(ids, Sampling(**values), pieces.append, frozenset({2}), mix.adapter, mix.mixture, mix.label)
    request.pieces = pieces  # type: ignore[attr-defined]
    return engine.submit(request)


def alone(base: Path, path: Path | None, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens of PEFT and transformers for one request."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model = PeftModel.from_pretrained(model, path).eval() if path else model
    return continued(model, ids, tokens)


def continued(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens of transformers, beyond the end token."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                              max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
    return made[0, len(ids) :].tolist()


CASES = {
    "roomy": {},
    "prompts in pieces": {"max_batch_tokens": 3},
    "little room": {"pool_pages": 200, "max_batch_tokens": 7},
    "optimistic": {"pool_pages": 150, "optimistic": True, "max_batch_tokens": 5},
    "reference, clustered": {"backend": "reference", "scheduler": "cluster", "cluster": 2},
    "fixed halves": {"pool_pages": 400, "adapter_share": 0.5},
    "fair": {"scheduler": "vtc", "max_running": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_that_of_its_own_adapter(base, several, case):
    """Greedy tokens against PEFT one by one: mixed ranks and kinds, chunks, evictions, preemption, any scheduler."""
    engine, names = served(base, **CASES[case])
    order = random.Random(3)
    chosen = [None, *several] if "pool_pages" not in CASES[case] else [None, "small", "medium", "rslora", "dora"]
    chosen = [None, "small"] if case == "optimistic" else chosen
    for name, path in several.items():
        if name in chosen:
            names.add(name, path)
    requests = []
    for number in range(10):
        name = order.choice(chosen)
        ids = [order.randrange(6, 200) for _ in range(order.randrange(1, 14))]
        requests.append((name, ids, 9 + number % 5))
    running = [asked(engine, names, ids, {name: 1.0} if name else {}, max_tokens=tokens)
               for name, ids, tokens in requests[:6]]  # fmt: skip
    for _ in range(2):
        engine.step()
        engine.pool.check()
    running += [asked(engine, names, ids, {name: 1.0} if name else {}, max_tokens=tokens)
                for name, ids, tokens in requests[6:]]  # fmt: skip
    while not engine.idle:
        engine.step()
        engine.pool.check()
    for request, (name, ids, tokens) in zip(running, requests, strict=True):
        assert request.answer == alone(base, several[name] if name else None, ids, tokens), name
        assert [piece.reason for piece in request.pieces][-1] == "length"
    if case == "optimistic":
        assert engine.metrics.total("num_preemptions_total") > 0
    if case == "fixed halves":
        assert engine.pool.stats().adapter <= 200
    if case == "little room":
        assert engine.store.counts.evictions > 0
    assert engine.pool.stats().kv == 0
    engine.close()
    with torch.no_grad():
        ids = torch.tensor([[10, 20, 30]])
        assert torch.equal(engine.base.model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)


@pytest.fixture(scope="module")
def mixtures(base, make, tmp_path_factory) -> dict[str, Path]:
    """A MixLoRA, a MoLA and an X-LoRA of the base, with random experts and routers."""
    from peft import get_peft_model

    from adapters.formats import read
    from adapters.formats.fit import fit
    from adapters.layers.experts import xlora
    from adapters.layers.experts.classifier import ClassifierOptions

    folder, made = tmp_path_factory.mktemp("mixtures"), {}
    for seed, method in enumerate(("mixlora", "mola")):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                               preset(method, r=4, num_experts=4, task_type="CAUSAL_LM"))  # fmt: skip
        for name, parameter in model.named_parameters():
            if "moeadapter" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / method)
        made[method] = folder / method
    model = AutoModelForCausalLM.from_pretrained(base)
    experts = [xlora.expert(name, fit(read(make(name, 4, seed)), {"model": model}))
               for seed, name in enumerate(("law", "code"))]  # fmt: skip
    torch.manual_seed(5)
    wrapped = xlora.add(model, experts, ClassifierOptions(depth=1, layerwise=True), task_type="CAUSAL_LM")
    for weight, _ in xlora.classifier(wrapped).linear_layers():
        torch.nn.init.normal_(weight, std=0.5)
    wrapped.save_pretrained(folder / "team")
    made["team"] = folder / "team"
    return made


def test_mixtures_of_experts_are_served_beside_everything_else(base, several, mixtures):
    """MixLoRA, MoLA and X-LoRA in one batch with LoRAs and the base; a LoRA beside a mixture."""
    engine, names = served(base, max_batch_tokens=5)
    for name, path in {**mixtures, "small": several["small"], "large": several["large"]}.items():
        names.add(name, path)
    asks = [{"mixlora": 1.0}, {}, {"team": 1.0}, {"small": 1.0}, {"mola": 1.0}, {"team": 1.0}, {"mixlora": 1.0},
            {"mixlora": 1.0, "large": 0.5}, {"small": 0.5, "large": 1.0}]  # fmt: skip
    prompts = [[10 + 7 * number, 40, 60 + number, 80, 30, 20, 99][: 3 + number % 5] for number in range(len(asks))]
    requests = [asked(engine, names, ids, weights) for ids, weights in zip(prompts, asks, strict=True)]
    while not engine.idle:
        engine.step()
        engine.pool.check()
    adapted = AdaptedModel(AutoModelForCausalLM.from_pretrained(base).eval())
    for name, path in {**mixtures, "small": several["small"], "large": several["large"]}.items():
        adapted.add(name, path)
    for request, ids, weights in zip(requests, prompts, asks, strict=True):
        with adapted.active(weights) as model:
            assert request.answer == continued(model, ids, 8), weights
    with pytest.raises(InputError, match=r"use 1, not 0\.5"):
        names.mix({"mola": 0.5})
    with pytest.raises(InputError, match="both mixtures"):
        names.mix({"mola": 1, "team": 1})
    late = asked(engine, names, [10, 20], {"team": 1.0})
    names.remove("team")
    engine.finish([late])
    assert not any(key.startswith("team") for key in engine.mixtures)


def test_an_adapter_that_is_unloaded_finishes_its_requests_first(base, several, tmp_path):
    engine, names = served(base, tmp_path)
    shutil.copytree(several["medium"], tmp_path / "kept")
    pinned = names.pin("kept")
    assert engine.store.make_room(engine.pool.total) is False
    names.remove("kept")
    assert pinned.rank == 4
    with pytest.raises(UnknownModelError, match="did you mean 'kept'"):
        names.pin("kep")
    shutil.copytree(several["small"], tmp_path / "mine")
    first = asked(engine, names, [10, 20, 30], {"mine": 1.0}, max_tokens=6)
    engine.step()
    waiting = asked(engine, names, [10, 20, 30], {"mine": 1.0}, max_tokens=6)
    wanted = alone(base, several["small"], [10, 20, 30], 6)
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(several["large"], tmp_path / "mine")  # another file under the same name: new requests get it
    second = asked(engine, names, [10, 20, 30], {"mine": 1.0}, max_tokens=6)
    engine.finish([first, waiting, second])
    assert first.answer == waiting.answer == wanted
    assert second.answer == alone(base, several["large"], [10, 20, 30], 6) != wanted
    assert len(engine.store) == 1
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="readable"):
        names.mix({"mine": 1.0})
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(UnknownModelError, match="no model 'mine'"):
        names.mix({"mine": 1.0})
    engine.step()
    assert engine.pool.free_pages == engine.pool.total
    engine.close()


def test_what_cannot_be_served_is_refused_with_the_reason(base, several, make, tmp_path):
    engine, names = served(base, tmp_path, pool_pages=600, max_rank=6, max_waiting=1)
    with pytest.raises(InputError, match=r"rank 8 .* above the largest that is served, 6"):
        names.add("large", several["large"])
    wide = tiny.llama(tmp_path / "wide", hidden=48)
    with pytest.raises(FamilyError, match="does not fit base-model"):
        names.add("wide", make("wide", 2, 1, on=wide))
    with pytest.raises(InputError, match="trains biases"):
        names.add("bias", make("bias", 2, 1, bias="lora_only"))
    with pytest.raises(InputError, match="replaces whole modules"):
        names.add("whole", make("whole", 2, 1, modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match="trainable_token_indices"):
        names.add("tokens", make("tokens", 2, 1, trainable_token_indices=[5]))
    shutil.copytree(several["small"], tmp_path / "labels")
    config = tmp_path / "labels" / "adapter_config.json"
    config.write_text(config.read_text().replace("CAUSAL_LM", "TOKEN_CLS"))
    with pytest.raises(InputError, match="for TOKEN_CLS"):
        names.add("labels", tmp_path / "labels")
    for bad in ("", " ", "a/b", "..", "auto", "base-model"):
        with pytest.raises(InputError, match=r"cannot be called|meaning of its own"):
            names.add(bad, several["small"])
    names.add("small", several["small"])
    with pytest.raises(InputError, match="already been loaded"):
        names.add("small", several["small"])
    with pytest.raises(UnknownModelError, match="did you mean 'small'"):
        names.mix({"smal": 1.0})
    for path in ("../small", "/etc/passwd", "a\0b"):
        with pytest.raises(UnknownModelError):
            names.mix({path: 1.0})
    with pytest.raises(InputError, match="no tokens"):
        asked(engine, names, [], {})
    with pytest.raises(InputError, match="more than the 512"):
        asked(engine, names, [5] * 500, {}, max_tokens=20)
    with pytest.raises(InputError, match="more than the pool has"):
        asked(engine, names, [5] * 200, {}, max_tokens=100)
    with pytest.raises(InputError, match="temperature must be from 0"):
        asked(engine, names, [5], {}, temperature=-1)
    with pytest.raises(InputError, match="top_p must be above 0"):
        asked(engine, names, [5], {}, temperature=1, top_p=0.0)
    held = asked(engine, names, [5], {})
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        asked(engine, names, [5], {})
    engine.finish([held])
    with pytest.raises(InputError, match="max_running must be at least 1"):
        ServeConfig(max_running=0).check()
    with pytest.raises(InputError, match="did you mean 'fcfs'"):
        scheduler("fcf")


def test_models_whose_attention_needs_more_than_pages_are_refused(tmp_path):
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    from adapters.serving.pool import PagePool

    bloom = BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(FamilyError, match="This bloom model cannot be served"):
        PagedModel(bloom, PagePool(200, 32))
    with pytest.raises(FamilyError, match="linear_attention"):
        shape_of(MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2)))
    sliding = MistralForCausalLM(MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3,
    )).eval()  # fmt: skip
    with pytest.raises(InputError, match="too few"):
        PagedModel(sliding, PagePool(20, 16))
    PagedModel(sliding, PagePool(200, 16))  # its own check compares seven tokens


def test_other_architectures_compute_the_same_on_pages():
    """Each is compared with its own forward pass when it is opened: windows, soft caps, other names and layouts."""
    import transformers

    from adapters.serving.pool import PagePool

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    grouped = sizes | {"num_key_value_heads": 2, "head_dim": 8}
    window = grouped | {"sliding_window": 3, "query_pre_attn_scalar": 8}
    for name, values in {"Gemma2": window, "Qwen3": grouped, "GPTNeoX": sizes,
                         "GPT2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}}.items():  # fmt: skip
        model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
        made = model(getattr(transformers, f"{name}Config")(**values)).eval()
        PagedModel(made, PagePool(200, shape_of(made).page)).close()


def test_cancelled_and_late_requests_leave_their_pages(base, several):
    engine, names = served(base, scheduler="early-abort", slo=0.6)
    names.add("small", several["small"])
    going = [asked(engine, names, [10, 20, 30], {"small": 1.0}, max_tokens=50) for _ in range(3)]
    engine.step()
    engine.cancel(going[0])
    late = asked(engine, names, [10, 20], {})
    late.arrived -= 1
    engine.step()
    assert [going[0].pieces[-1].reason, late.pieces[-1].reason] == ["cancelled", "late"]
    engine.pool.check()
    for request in going[1:]:
        engine.cancel(request)
    engine.step()
    assert engine.pool.stats().kv == 0
    assert engine.store.users(engine.store.resident[0]) == 0


def test_the_newest_goes_first_under_load_and_the_least_served_in_fairness():
    def request(label: str) -> Request:
        return Request([1, 2], Sampling(), lambda piece: None, label=label, adapter=label)

    waiting = [request("a"), request("a"), request("b")]
    abort = scheduler("early-abort")
    for one in waiting:
        abort.arrived(one, [], [])
    assert abort.order(waiting, []) == waiting[::-1]
    fair = scheduler("vtc")
    for one in waiting:
        fair.arrived(one, [], [])
    fair.admitted(waiting[0])
    fair.generated(waiting[0])
    assert fair.order(waiting[1:], [])[0] is waiting[2]
    back = request("c")
    fair.served |= {"a": 9.0, "b": 7.0}
    fair.arrived(back, waiting, [])
    assert fair.served["c"] == 7.0
    near = scheduler("cluster", adapters=1)
    assert near.order(waiting, [waiting[2]]) == [waiting[2]]


def test_sampling_repeats_by_its_seed_whatever_else_runs(base, several):
    engine, names = served(base)
    names.add("small", several["small"])
    lively = {"temperature": 1.3, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5, "logprobs": 2}
    first = asked(engine, names, [10, 20, 30], {"small": 1.0}, **lively)
    engine.finish([first])
    others = [asked(engine, names, [number + 6] * 5, {}, temperature=1.0, seed=number) for number in range(3)]
    again = asked(engine, names, [10, 20, 30], {"small": 1.0}, **lively)
    engine.finish([again, *others])
    assert again.answer == first.answer
    found = [entry for piece in first.pieces for entry in piece.tokens]
    assert [entry.token for entry in found] == first.answer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), several["small"]).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([[10, 20, 30, *first.answer]])).logits[0, 2:-1].log_softmax(-1)
    for entry, row in zip(found, wanted, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(float(row.max()), abs=1e-4)


def test_tokens_are_chosen_as_transformers_does():
    """Nucleus, top-k and repetition penalty against transformers' own processors."""
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    scores = torch.randn(1, 50)
    for top_p, top_k in ((0.7, 0), (1.0, 5), (0.5, 10)):
        wanted = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
        assert torch.allclose(nucleus(scores[0], top_p, top_k), wanted[0].softmax(-1), atol=1e-6)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 7, 3]]), scores.clone())
    assert torch.equal(penalised(scores[0], Sampling(repetition_penalty=1.3), [3, 7], [3]), wanted[0])
    biased = penalised(scores[0], Sampling(frequency_penalty=1, presence_penalty=0.5, logit_bias={4: 2.0}), [], [9, 9])
    assert biased[9] == pytest.approx(float(scores[0, 9]) - 2.5)
    assert biased[4] == pytest.approx(float(scores[0, 4]) + 2)


def test_text_comes_in_whole_characters_and_ends_before_a_stop_text():
    spelling = tiny.tokenizer()
    text = "héllo – 你好 STOPPED"
    stream = TextStream(spelling, ["STOP", "zz"])
    pieces = [stream.push(token) for token in spelling.encode(text)]
    assert "�" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == "héllo – 你好 "
    assert stream.stopped
    open_end = TextStream(spelling, ["STOP"])
    shown = "".join(open_end.push(token) for token in spelling.encode("a ST"))
    assert shown == "a "
    assert open_end.finish() == "ST"
    broken = TextStream(spelling)
    assert "".join(broken.push(token) for token in spelling.encode("é")[:1]) == ""
    assert broken.finish() == "�"


def test_numbers_that_cannot_be_sampled_end_their_own_request_alone(base, several):
    engine, names = served(base)
    names.add("small", several["small"])
    bad = asked(engine, names, [10, 20], {"small": 1.0}, temperature=1e-320, top_p=1.0)
    good = asked(engine, names, [10, 20], {"small": 1.0})
    engine.finish([bad, good])
    assert bad.pieces[-1].reason == "error"
    assert good.answer == alone(base, several["small"], [10, 20], 8)
    names.remove("small")
    assert engine.pool.free_pages == engine.pool.total


def test_a_thread_answers_and_survives_a_failure(base, several, monkeypatch):
    engine, names = served(base)
    engine.start()
    names.add("small", several["small"])
    request = asked(engine, names, [10, 20], {"small": 1.0})
    until = time.monotonic() + 20
    while not request.done and time.monotonic() < until:
        time.sleep(0.01)
    assert request.answer == alone(base, several["small"], [10, 20], 8)
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *args: 1 / 0)
    failed = asked(engine, names, [10, 20], {})
    while not failed.done and time.monotonic() < until:
        time.sleep(0.01)
    assert failed.pieces[-1].reason == "error"
    monkeypatch.setattr(engine.model, "forward", forward)
    again = asked(engine, names, [10, 20], {})
    while not again.done and time.monotonic() < until:
        time.sleep(0.01)
    assert again.pieces[-1].reason == "length"
    engine.close()
    assert engine.pool.free_pages + engine.pool.stats().adapter == engine.pool.total


def test_the_request_chooses_its_adapter_or_the_base(base, several, tmp_path):
    """Descriptions from cards and training rows; a request that is near to none, or to two, is left to the base."""
    from studio.serving.automatic import Chooser, Index

    rows = {
        "cooking": ["How long do I boil an egg?", "What goes into a tomato sauce?", "How do I bake bread in an oven?"],
        "planets": ["How far is Mars from the sun?", "Which planet has rings?", "How long is a year on Venus?"],
    }
    index = Index(rows)
    assert index.best("How do I boil potatoes for a sauce?")[0] == "cooking"
    assert index.best("Does Venus have rings like other planets?")[0] == "planets"
    assert index.best("zqx wvk")[1] == 0.0
    assert index.best("") == ("", 0.0)
    assert Index({}).best("anything") == ("", 0.0)
    assert Index(rows | {"twin": rows["cooking"]}).best("How long do I boil an egg?")[1] == 0.0
    for name, told in (("cooking", "Recipes: boiling, baking, sauces."), ("planets", "Mars, Venus and their orbits.")):
        shutil.copytree(several["small"], tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\ndescription: '{told}'\n---\n# {name}\n")
    engine, names = served(base, tmp_path)
    choose = Chooser(names, threshold=0.4)
    assert choose("Any good sauces for baking?") == "cooking"
    assert choose("Tell me about the orbits of Venus and Mars") == "planets"
    assert choose("qwertz") == "base-model"
    shutil.rmtree(tmp_path / "planets")
    assert choose("Tell me about the orbits of Venus and Mars") == "base-model"
    engine.close()


def test_a_refused_prompt_leaves_none_of_its_list_waiting(base, several, tmp_path):
    """With and without a thread of its own; the engine then answers as before."""
    serve = ServeEngine.from_pretrained(base, ServeConfig(pool_pages=4000))
    free = serve.engine.pool.free_pages
    for threaded in (False, True):
        if threaded:
            serve.start()
        with pytest.raises(InputError, match="not in the vocabulary"):
            serve.generate([[5, 6, 7], [5, 10**6]], sampling=Sampling(max_tokens=4))
        with pytest.raises(InputError):
            serve.generate([[5, 6, 7], [8]], sampling=[Sampling(max_tokens=4), Sampling(max_tokens=0)])
        until = time.monotonic() + 20
        while not serve.engine.idle and time.monotonic() < until:
            time.sleep(0.01)
        assert serve.engine.idle
        assert serve.engine.pool.free_pages == free
        assert len(serve.generate([[5, 6, 7]], sampling=Sampling(max_tokens=4, ignore_eos=True))[0].tokens) == 4
    serve.close()


def test_only_rows_of_the_studios_own_trainings_are_read(base, several, tmp_path, monkeypatch):
    """The recipe in an adapter's file names whatever its maker likes."""
    from studio import jobs
    from studio.serving.automatic import Chooser, described

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How far is Neptune from the sun?"}\n')
    shutil.copytree(several["small"], tmp_path / "served" / "mine")
    engine, names = served(base, tmp_path / "served")
    (record,) = names.records()
    foreign = replace(record, recipe={"config": {"data": str(rows)}})
    assert not any("Neptune" in text for text in described(foreign))
    monkeypatch.setattr(jobs, "list", lambda *_: [])
    assert Chooser(names, threshold=0.1)("How far is Neptune?") == "base-model"
    done = SimpleNamespace(config={"data": str(rows)}, result={"adapter": str(record.path)})
    monkeypatch.setattr(jobs, "list", lambda *_: [done])
    assert Chooser(names, threshold=0.1)("How far is Neptune?") == "mine"
    engine.close()


def test_folders_are_read_again_only_when_they_have_changed(base, several, tmp_path, monkeypatch):
    from studio.library import scan

    reads: list[Path] = []
    record = scan.record
    monkeypatch.setattr(scan, "record", lambda path, *rest: reads.append(path) or record(path, *rest))
    (tmp_path / "deeper" / "empty").mkdir(parents=True)
    shutil.copytree(several["small"], tmp_path / "one")
    engine, names = served(base, tmp_path)
    first = names.records()
    assert names.records() is first
    assert reads == [tmp_path / "one"]
    shutil.copytree(several["medium"], tmp_path / "deeper" / "empty" / "two")
    assert [one.name for one in names.records()] == ["one", "two"]
    (tmp_path / "one" / "README.md").write_text("---\ndescription: changed\n---\n")
    assert [one.notes.get("description") for one in names.records()] == ["changed", None]
    shutil.rmtree(tmp_path / "deeper")
    assert [one.name for one in names.records()] == ["one"]
    before = len(reads)
    names.records()
    assert len(reads) == before
    engine.close()
