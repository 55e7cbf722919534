"""Make the toy: train the base and both concepts, and write them (``python -m tests.toy.make``).

Takes about twelve minutes of one core. The velocity of a random step is predicted (noise says nothing about colours in
the first steps of sampling), the text is left out in a tenth of the pictures so that guidance works.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests import toy

STEPS, CONCEPT_STEPS, BATCH, RANK = 2400, 1000, 32, 8


def drawn(count: int, generator: torch.Generator, colour: str = "", form: str = "") -> Tensor:
    """A picture (3, 8, 16) in [-1, 1] with ``count`` shapes; two of them have a half each."""
    picture = torch.zeros(3, toy.HEIGHT, toy.WIDTH)
    places = [(0, toy.WIDTH)] if count == 1 else [(0, toy.WIDTH // 2), (toy.WIDTH // 2, toy.WIDTH)]

    def pick(values: Any) -> Any:
        return list(values)[int(torch.randint(len(values), (), generator=generator))]

    for first, end in places:
        size = pick((4, 5))
        top = pick(range(toy.HEIGHT - size + 1))
        left = first + pick(range(end - first - size + 1))
        shape = torch.ones(size, size)
        if (form or pick(("square", "disc"))) == "disc":
            shape[0, 0] = shape[0, -1] = shape[-1, 0] = shape[-1, -1] = 0
        tint = torch.tensor(toy.PALETTE[colour or pick(toy.PALETTE)])
        window = picture[:, top : top + size, left : left + size]
        window.copy_(torch.where(shape.bool(), tint[:, None, None], window))
    return picture * 2 - 1


def text(pipe: Any, prompts: list[str]) -> Tensor:
    """Embeddings (batch, tokens, width), with gradients."""
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


def train(
    pipe: Any, parameters: list[Tensor], sample: Callable[[], tuple[Tensor, list[str]]], steps: int, rate: float
) -> float:
    """Train ``parameters`` on pictures and prompts of ``sample``; returns the mean loss of the last tenth."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    total = pipe.scheduler.config.num_train_timesteps
    losses = []
    for step in range(steps):
        pictures, prompts = sample()
        prompts = ["" if float(torch.rand(())) < 0.1 else prompt for prompt in prompts]
        noise, times = torch.randn_like(pictures), torch.randint(total, (len(pictures),))
        noisy = pipe.scheduler.add_noise(pictures, noise, times)
        target = pipe.scheduler.get_velocity(pictures, noise, times)
        loss = F.mse_loss(pipe.unet(noisy, times, text(pipe, prompts)).sample, target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 200 == 199:
            print(f"step {step + 1}: loss {sum(losses[-200:]) / 200:.4f}", flush=True)
    return sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])


def base(steps: int) -> Any:
    """Train the base."""
    pipe = toy.pipeline(weights=False)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def sample() -> tuple[Tensor, list[str]]:
        counts = [1 + int(torch.randint(2, (), generator=generator)) for _ in range(BATCH)]
        pictures = torch.stack([drawn(count, generator) for count in counts])
        return pictures, [f"{toy.WORDS[count - 1]} obj" for count in counts]

    parameters = [*pipe.unet.requires_grad_(True).parameters(), *pipe.text_encoder.requires_grad_(True).parameters()]
    train(pipe, parameters, sample, steps, 2e-3)
    return pipe


def concept(name: str, steps: int) -> dict[str, Tensor]:
    """Train a concept on the base; its tensors in kohya's names, its word beside them."""
    from peft import LoraConfig

    word, colour, form = toy.CONCEPTS[name]
    pipe = toy.pipeline()
    pipe.tokenizer.add_tokens([word])
    number = pipe.tokenizer.convert_tokens_to_ids(word)
    table = pipe.text_encoder.get_input_embeddings()
    row = torch.nn.Parameter(table.weight[pipe.tokenizer.convert_tokens_to_ids("obj")].clone())
    table.register_forward_hook(lambda _, args, out: torch.where((args[0] == number)[..., None], row, out))
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(toy.TARGETS)))
    generator = torch.Generator().manual_seed(1)

    def sample() -> tuple[Tensor, list[str]]:
        return torch.stack([drawn(1, generator, colour, form) for _ in range(BATCH)]), [f"one {word}"] * BATCH

    own = {key: value for key, value in pipe.unet.named_parameters() if "lora_" in key}
    train(pipe, [*own.values(), row], sample, steps, 3e-3)
    made = {}
    for key, value in own.items():
        module = "lora_unet_" + key.partition(".lora_")[0].replace(".", "_")
        made[f"{module}.lora_{'down' if 'lora_A' in key else 'up'}.weight"] = value.detach()
        made[f"{module}.alpha"] = torch.tensor(float(RANK))
    return made | {f"bundle_emb.{word}.string_to_param.*": row.detach()[None]}


def write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the base")
    parser.add_argument("--concept-steps", type=int, default=CONCEPT_STEPS)
    parser.add_argument("--only", choices=("base", *toy.CONCEPTS), help="make this part alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    if options.only in (None, "base"):
        pipe = base(options.steps)
        parts = {part: getattr(pipe, part).state_dict() for part in ("unet", "text_encoder")}
        write({f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}, toy.BASE)
    for name in toy.CONCEPTS:
        if options.only in (None, name):
            write(concept(name, options.concept_steps), toy.adapter(name))
    print(f"{time.process_time() - begun:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
