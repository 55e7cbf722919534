"""Test bed T: a tiny language model that speaks three dialects and has to learn a fourth.

32 tokens, sequences of 14. Dialect d has four permutations P_0..P_3 of the tokens; x_0 = d mod 4, and
x_t = P_{x_{t-2} mod 4}[x_{t-1}] with probability 0.9, else a token drawn from 4..31. The model is a Llama of two
layers, width 64, trained on dialects 0 to 2; ``dialects.safetensors`` holds it (``python -m benchmarks.dialects`` makes
it again, 20 s). Adapters are tried on dialect 3, on the 14 matrices of attention and feed-forward.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS, LENGTH, NOISE = 32, 14, 0.1
OLD, NEW = (0, 1, 2), 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = Path(__file__).with_suffix(".safetensors")


def sequences(dialect: int, count: int, generator: torch.Generator, noise: float = NOISE) -> Tensor:
    """(count, 14) sequences of a dialect."""
    rule = torch.Generator().manual_seed(100 + dialect)
    permutations = torch.stack([torch.randperm(TOKENS, generator=rule) for _ in range(4)])
    found = torch.zeros(count, LENGTH, dtype=torch.long)
    found[:, 0] = dialect % 4
    found[:, 1] = torch.randint(4, TOKENS, (count,), generator=generator)
    for t in range(2, LENGTH):
        following = permutations[found[:, t - 2] % 4, found[:, t - 1]]
        other = torch.randint(4, TOKENS, (count,), generator=generator)
        found[:, t] = torch.where(torch.rand(count, generator=generator) < noise, other, following)
    return found


def batch(dialect: int, count: int, seed: int, number: int, noise: float = NOISE) -> Tensor:
    """Batch ``number`` of a run."""
    return sequences(dialect, count, torch.Generator().manual_seed(7919 * seed + number + 1), noise)


def empty_model(seed: int = 0) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def model() -> LlamaForCausalLM:
    """The model that speaks dialects 0 to 2."""
    made = empty_model()
    made.load_state_dict(load_file(WEIGHTS))
    return made.requires_grad_(False)


@torch.no_grad()
def loss_on(model: torch.nn.Module, dialects: tuple[int, ...], count: int = 512, seed: int = 999) -> float:
    """Mean token loss on fixed sequences of some dialects."""
    was = model.training
    model.eval()
    losses = []
    for dialect in dialects:
        ids = sequences(dialect, count, torch.Generator().manual_seed(seed + dialect))
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    model.train(was)
    return sum(losses) / len(losses)


def pretrain(steps: int = 700) -> LlamaForCausalLM:
    """Train the model on dialects 0 to 2."""
    made = empty_model().train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        ids = batch(OLD[step % 3], 48, 12345, step)
        loss = made(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return made.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = pretrain()
    print(f"old dialects {loss_on(trained, OLD):.3f}, new dialect {loss_on(trained, (NEW,)):.3f}")
    save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
