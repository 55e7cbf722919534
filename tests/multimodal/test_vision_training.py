"""Vision-language training: equal to PEFT on the language model, exact resume, both drivers, an ordinary adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import studio
from adapters.errors import Cancelled, FamilyError, InputError
from adapters.formats import read
from pipelines.multimodal.adapters import AdaptedVision
from pipelines.multimodal.answer import inputs_of, processed
from pipelines.multimodal.loading import language_part, open_model
from pipelines.multimodal.messages import PLACE, with_pictures
from studio.datasets.seeds import global_seed
from studio.inspection import experts
from studio.training.drivers import accelerate
from studio.training.drivers.trainer import RunSampler
from studio.training.optimizers import lr_factor
from studio.training.session import TrainSession
from studio.training.tasks.vision_language import Collate, VisionLanguageTask, encode, run
from tests.language.conftest import Watcher
from tests.multimodal import tiny
from tests.multimodal.conftest import COLOURS, settings, write_rows

INNER = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter"]) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(llava, sights, tmp_path_factory) -> tuple[dict, Watcher]:
    watcher = Watcher()
    config = settings(llava, sights, steps=6)
    return run(config, tmp_path_factory.mktemp("trained"), watcher), watcher


def stock(llava: Path) -> tuple[torch.nn.Module, list[str]]:
    """Transformers' model and PEFT's names of the language model's linear layers, found without our code."""
    model = AutoModelForImageTextToText.from_pretrained(llava).requires_grad_(False)
    inside = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return model, [n for n in inside if n.startswith("model.language_model.layers.") and n.rpartition(".")[2] in INNER]


def by_hand(llava: Path, sights: Path) -> list[dict[str, torch.Tensor]]:
    """Each row as stock transformers make it: the prompt is not learnt, the answer and its end are."""
    processor = AutoProcessor.from_pretrained(llava)
    found = []
    for line in sights.read_text().splitlines():
        row = json.loads(line)
        picture = Image.open(sights.parent / row["image"]).convert("RGB")
        prompt = f"USER: <image>\n{row['question']} ASSISTANT:"
        before = processor(text=prompt, images=picture, return_tensors="pt")
        made = processor(text=f"{prompt} {row['answer']}</s>", images=picture, return_tensors="pt")
        labels = made["input_ids"].clone()
        labels[:, : before["input_ids"].shape[1]] = -100
        found.append({**made, "labels": labels})
    return found


def test_it_is_plain_peft_on_the_language_model(llava, sights, trained):
    """Six steps of a loop written out here, one row at a time: the same losses and the same weights."""
    result, watcher = trained
    model, targets = stock(llava)
    assert len(targets) == 2 * len(INNER)
    config = settings(llava, sights, steps=6)
    with global_seed(config.seed, "init"):
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM"))
    samples = by_hand(llava, sights)
    order = list(RunSampler(len(samples), 6 * 2, config.seed))
    a = [p for name, p in peft.named_parameters() if "lora_A" in name]
    b = [p for name, p in peft.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.AdamW([{"params": a}, {"params": b}], lr=1e-2, weight_decay=0)
    peft.train()
    losses = []
    for step in range(6):
        rows = [samples[number] for number in order[2 * step : 2 * step + 2]]
        counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
        total = sum(
            peft(**row).loss * count / sum(counts) for row, count in zip(rows, counts, strict=True)
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, 6, config)
        total.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    assert watcher.losses == pytest.approx(losses, rel=1e-5)
    state = {name: p for name, p in peft.state_dict().items() if "lora_" in name}
    made = weights(result)
    assert made.keys() == {name.replace(".default.weight", ".weight") for name in state}
    for name, tensor in made.items():
        assert torch.allclose(tensor, state[name.replace(".weight", ".default.weight")], atol=2e-5), name


def test_gradients_equal_those_of_peft(llava, sights, tmp_path):
    """One batch of rows of different length, padded, against the rows one by one."""
    task = VisionLanguageTask(settings(llava, sights, batch_size=6))
    session = TrainSession.of(task, tmp_path, Watcher())
    task.open(session)
    task.encode()
    batch = task.collator(task.samples)
    model, targets = stock(llava)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    peft(**batch).loss.backward()
    ours = {name: p.grad.clone() for name, p in peft.named_parameters() if p.requires_grad}
    peft.zero_grad()
    rows = by_hand(llava, sights)
    counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    assert len(set(counts)) > 1
    for row, count in zip(rows, counts, strict=True):
        (peft(**row).loss * count / sum(counts)).backward()
    for name, p in peft.named_parameters():
        if p.requires_grad:
            assert torch.allclose(ours[name], p.grad, atol=1e-6), name


def test_stock_transformers_and_peft_read_it(llava, sights, trained):
    """The exported folder in PEFT and in our hooks: the same logits; the eyes are untouched."""
    result, _ = trained
    model, _ = stock(llava)
    loaded = PeftModel.from_pretrained(model, result["adapter"]).eval()
    assert not any("vision" in name or "projector" in name for name, _ in loaded.named_parameters() if "lora" in name)
    base = open_model(llava)
    adapted = AdaptedVision(base)
    adapted.add("it", Path(result["adapter"]))
    inputs = inputs_of(base, with_pictures([{"role": "user", "content": f"{PLACE}hue?"}],
                                           [Image.new("RGB", (24, 16), "green")]))  # fmt: skip
    with torch.no_grad():
        plain = base.model(**inputs).logits
        with adapted.active({"it": 1.0}) as active:
            ours = active(**inputs).logits
        theirs = loaded(**inputs).logits
    assert float((ours - plain).abs().max()) > 1e-3
    assert torch.allclose(ours, theirs, atol=1e-5)
    card = (Path(result["adapter"]) / "README.md").read_text()
    assert "AutoProcessor.from_pretrained(base)" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_names_of_older_versions_and_of_the_language_model_alone(llava, trained, tmp_path):
    """The same numbers under other names act the same; a layer of no model is refused."""
    result, _ = trained
    base = open_model(llava)
    known = read(Path(result["adapter"]))
    changed = {
        "old": lambda name: name.replace("model.language_model.", "language_model.model."),
        "alone": lambda name: name.replace("model.language_model.", "model."),
        "none": lambda name: name.replace("layers.1.", "layers.7."),
    }
    files = {}
    for kind, rename in changed.items():
        place = tmp_path / kind
        place.mkdir()
        tensors = load_file(Path(result["adapter"]) / "adapter_model.safetensors")
        from safetensors.torch import save_file

        save_file({rename(name): tensor for name, tensor in tensors.items()}, place / "adapter_model.safetensors")
        config = json.loads((Path(result["adapter"]) / "adapter_config.json").read_text())
        config["target_modules"] = [rename(name) for name in config["target_modules"]]
        (place / "adapter_config.json").write_text(json.dumps(config))
        files[kind] = place
    adapted = AdaptedVision(base)
    for kind in ("old", "alone"):
        found = adapted.read(files[kind])
        assert {m for _, m, _ in found.layers()} == {m for _, m, _ in known.layers()}
    with pytest.raises(FamilyError, match=r"layers\.7"):
        adapted.read(files["none"])


def test_stopped_and_resumed_is_the_uninterrupted_run(llava, sights, tmp_path):
    config = settings(llava, sights, steps=5, dropout=0.2, gradient_accumulation=2, validation_split=0.3,
                      validation_every=2, sample_every=2)  # fmt: skip
    whole = run(config, tmp_path / "whole", Watcher())
    with pytest.raises(Cancelled, match="step 3 of 5"):
        run(config, tmp_path / "part", Watcher(stop_at=3))
    resumed = run(config, tmp_path / "part", Watcher(), resume=True)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["validation"] == resumed["validation"]
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("whole", "part")]
    assert answers[0] == answers[1]
    line = json.loads(answers[0].splitlines()[0])
    assert line["expected"] in COLOURS
    assert line["prompt"] == f"{line['expected']}.png: hue?"
    assert set(whole["validation"][-1]) == {"step", "validation_loss", "accuracy", "exact_answers"}


def test_the_other_driver_makes_the_same_steps(llava, sights, trained, tmp_path):
    result, watcher = trained
    other = Watcher()
    session = TrainSession.of(VisionLanguageTask(settings(llava, sights, steps=6)), tmp_path, other)
    made = accelerate.train(session)
    assert other.losses == pytest.approx(watcher.losses, rel=1e-5)
    first, second = weights(result), weights(made)
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)


def test_it_learns_colours_and_counts_exact_answers(llava, sights, tmp_path):
    """A LoRA under a random language model tells six colours apart; the measure counts whole answers."""
    result = studio.train(
        "vision-language", folder=tmp_path / "run", base=str(llava), data=str(sights), validation_data=str(sights),
        steps=120, rank=16, learning_rate=1e-2, batch_size=6, validation_every=120, device="cpu", sample_tokens=8,
        sample_every=0, checkpoint_every=0, save_every=0,
    )  # fmt: skip
    last = result["validation"][-1]
    assert last["accuracy"] > 0.95
    assert last["exact_answers"] >= 5 / 6
    said = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert sum(line["answer"] == line["expected"] for line in said) >= 2


@pytest.mark.parametrize("make", [tiny.llava_next, tiny.idefics3])
def test_other_families(make, sights, tmp_path):
    """Pictures of several sizes have different numbers of tokens; a padded batch is what its rows are alone."""
    base = open_model(make(tmp_path / "base"))
    tall = Image.new("RGB", (16, 60), "blue")
    tall.save(sights.parent / "tall.png")
    rows = [{"image": "pictures/red.png", "question": "hue?", "answer": "red"},
            {"image": "tall.png", "question": "which hue?", "answer": "blue"}]  # fmt: skip
    data = write_rows(sights.parent / f"{make.__name__}.jsonl", rows)
    task = VisionLanguageTask(settings(Path(base.source), data))
    task.rows()
    items = {item.number: item for item in task.read.shown}
    samples = [encode(base, item)[0] for item in items.values()]
    collate = Collate(base, items)
    together = base.model(**collate(samples)).loss
    alone = [collate([sample]) for sample in samples]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in alone]
    expected = sum(base.model(**b).loss * n for b, n in zip(alone, counts, strict=True)) / sum(counts)
    assert float(together) == pytest.approx(float(expected), rel=1e-5)
    result = run(settings(Path(base.source), data, steps=2), tmp_path / "run", Watcher())
    assert all(f".{language_part(base.model).rpartition('.')[2]}.layers." in name for name in weights(result))


def test_refusals(llava, sights, tmp_path):
    from tests.language import tiny as texts

    text_only = texts.llama(tmp_path / "llama")
    with pytest.raises(InputError, match="does not look at pictures"):
        run(settings(text_only, sights), tmp_path, Watcher())
    with pytest.raises(InputError, match=r"model\.language_model in Llava.* matches target_regex"):
        run(settings(llava, sights, target_regex=r".*vision_tower.*q_proj"), tmp_path, Watcher())
    with pytest.raises(InputError, match=r"PICTURE: QUESTION"):
        settings(llava, sights, sample_prompts=["hue?"])
    with pytest.raises(InputError, match="at most 10 are read"):
        run(settings(llava, sights, max_length=10, too_long="refuse"), tmp_path, Watcher())
    with pytest.raises(FamilyError, match="has no language model"):
        language_part(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="cannot read this conversation"):
        processed(open_model(llava).processor, [[{"role": "user", "content": [{"type": "image", "image": 3}]}]], True)


def test_a_mixture_of_experts_trains_and_reloads_under_the_language_model(llava, sights, tmp_path):
    """LLaVA-MoLE: one router per feed-forward block; beside the untouched base it gives what training ended with."""
    result = run(settings(llava, sights, method="llava-mole", steps=3), tmp_path, Watcher())
    names = weights(result)
    assert any("router" in name for name in names)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    base = open_model(llava)
    talk = with_pictures([{"role": "user", "content": f"{PLACE}hue?"}], [Image.new("RGB", (24, 16), "green")])
    inputs = inputs_of(base, talk)
    theirs = PeftModel.from_pretrained(stock(llava)[0], result["adapter"]).eval()
    adapted = AdaptedVision(base)
    adapted.add("mole", Path(result["adapter"]))
    with torch.no_grad():
        plain = base.model(**inputs).logits
        with adapted.active({"mole": 1.0}) as active:
            ours = active(**inputs).logits
        assert torch.allclose(ours, theirs(**inputs).logits, atol=1e-5)
        assert torch.equal(base.model(**inputs).logits, plain)
    assert float((ours - plain).abs().max()) > 1e-4

    seen = experts.experts(str(result["adapter"]), [str(sights)], str(llava))
    assert seen.groups.keys() == {"rows", "rows, pictures"}
    assert seen.groups["rows, pictures"] == 6 * 4  # the tokens of six pictures
    assert [router["module"] for router in seen.routers] == [f"model.language_model.layers.{n}.mlp" for n in range(2)]
    assert all(sum(router["groups"]["rows, pictures"]) == pytest.approx(1) for router in seen.routers)
