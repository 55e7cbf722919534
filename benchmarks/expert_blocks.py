"""A feed-forward block with experts: CPU time, memory and parity of five ways to compute it.

Width 512, inner width 1408, 1024 tokens, 8 experts, 2 of them per token, rank 16, fp32: the size of the specification
of our mixtures. All ways have the same weights and the same input:

- ``LoRA``: the block with one LoRA on each layer, for scale;
- ``whole blocks``: every expert runs the frozen block on its own tokens, with its LoRAs (3 k products of the base);
- ``mixlora``: the layer of the package of that name (2 + k products);
- ``stacked``, ``loop``, ``sorted``: ours (3 products, as many as the block without experts).

Time is the least CPU time of one forward and one backward pass, all ways taking turns: :data:`ROUNDS` rounds, repeated
(``--seeds``) at other times, since programs beside it cost memory bandwidth. Memory is what autograd keeps for the
backward pass, each storage once, without the parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from adapters.layers.experts import ExpertBlock, MoeConfig, Place, Routing
from adapters.layers.experts.structure import structure_of

WIDTH, INNER, TOKENS, EXPERTS, CHOSEN, RANK, ALPHA = 512, 1408, 1024, 8, 2, 16, 32.0
ROUNDS = 9
ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def block_with_experts(compute: str = "auto") -> ExpertBlock:
    """A frozen feed-forward block of Llama with experts, all matrices random."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER)
    base = LlamaMLP(config).requires_grad_(False)
    structure = structure_of(base)
    assert structure is not None
    block = ExpertBlock(base, "mlp", Routing(), structure)
    choices = MoeConfig(
        placement="ffn_block", num_experts=EXPERTS, top_k=CHOSEN, r=RANK, lora_alpha=ALPHA, compute=compute,
        router_init="normal",
    )  # fmt: skip
    place = Place("mlp", "block", 0, EXPERTS, CHOSEN, RANK, ALPHA / RANK, tuple(structure.roles))
    block.update_layer("default", place, choices)
    for role in ROLES:
        nn.init.normal_(block.factors("default", role).B, std=0.02)
    return block


def whole_blocks(block: ExpertBlock) -> Callable[[Tensor], Tensor]:
    """Every expert computed as a block of its own, on the tokens that chose it."""
    base: Any = block.get_base_layer()
    scale = ALPHA / RANK

    def linear(role: str, expert: int, x: Tensor) -> Tensor:
        found = block.factors("default", role)
        return getattr(base, ROLES[role])(x) + x @ found.A[expert].T @ found.B[expert].T * scale  # type: ignore[no-any-return]

    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = block.moeadapter_router["default"](flat).softmax(-1).topk(CHOSEN)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for expert in range(EXPERTS):
            token, slot = torch.where(chosen == expert)
            own = flat[token]
            hidden = base.act_fn(linear("gate", expert, own)) * linear("up", expert, own)
            out = out.index_add(0, token, linear("down", expert, hidden) * weights[token, slot, None])
        return out.view_as(x)

    return forward


def published(block: ExpertBlock) -> tuple[Callable[[Tensor], Tensor], list[Tensor]] | None:
    """The layer of the package ``mixlora`` with the same weights, and its parameters; None if it is not installed.

    It wants dropout above 0; its layers are put in evaluation mode, so that none happens and none costs time.
    """
    try:
        from mixlora.config import MixLoraConfig
        from mixlora.lora_linear import LoraLinear
        from mixlora.model import MixLoraSparseMoe
    except ImportError:
        return None
    config = MixLoraConfig.from_config({
        "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "routing_strategy": "mixlora",
        "num_experts": EXPERTS, "top_k": CHOSEN, "act_fn": "silu", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05,
        "target_modules": dict.fromkeys(ROLES.values(), True), "bias": "none",
    })  # fmt: skip
    config.model_type_, config.dtype_, config.adapter_name_ = "llama", torch.float32, "default"
    base: Any = block.get_base_layer()
    layer = MixLoraSparseMoe(base, config)
    gate = block.moeadapter_router["default"].weight.detach().clone().requires_grad_()
    layer.gate_, learnt = gate, [gate]
    for role, name in ROLES.items():
        found = block.factors("default", role)
        for expert in range(EXPERTS):
            weights = (found.A[expert].detach().clone(), found.B[expert].detach().clone())
            made = LoraLinear(getattr(base, name), config, weights).eval()
            layer.experts_[f"experts.{expert}.{name}"] = made
            learnt += [made.lora_A.weight, made.lora_B.weight]
    return layer.forward, learnt


def one_lora() -> nn.Module:
    """The block with one LoRA of the experts' rank."""
    torch.manual_seed(0)
    base = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER))
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(ROLES.values())))  # type: ignore[arg-type]


def kept(forward: Callable[[Tensor], Tensor], x: Tensor, besides: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no storage takes the place of another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(x)
    return sum(found.values())


def gradients(block: ExpertBlock) -> list[Tensor]:
    """Of the router and of A and B, expert by expert, in the order of :func:`published`."""
    found = [block.moeadapter_router["default"].weight.grad]
    for role in ROLES:
        factors = block.factors("default", role)
        assert factors.A.grad is not None
        assert factors.B.grad is not None
        for expert in range(EXPERTS):
            found += [factors.A.grad[expert], factors.B.grad[expert]]
    return found  # type: ignore[return-value]


def measure() -> dict[str, Any]:
    blocks = {compute: block_with_experts(compute) for compute in ("stacked", "loop", "sorted")}
    ours = blocks["sorted"]
    ways: dict[str, Callable[[Tensor], Tensor]] = {"LoRA": one_lora(), "whole blocks": whole_blocks(ours)}
    theirs = published(ours)
    if theirs is not None:
        ways["mixlora"] = theirs[0]
    ways.update(blocks)
    x = torch.randn(4, TOKENS // 4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    wanted = ways["whole blocks"](x)
    wanted.backward(towards)
    reference, mine = [x.grad.clone(), *(g.clone() for g in gradients(ours))], list(ours.parameters())  # type: ignore[union-attr]
    found: dict[str, Any] = {"rounds": ROUNDS, "ways": {}}
    for name, forward in ways.items():
        own = list(forward.parameters()) if isinstance(forward, nn.Module) else mine
        besides = [*own, *mine, *(theirs[1] if theirs else []), x]
        found["ways"][name] = {"kept": kept(forward, x.detach(), besides), "seconds": []}
        if name in ("LoRA", "whole blocks"):
            continue
        x.grad = None
        for parameter in [*own, *(theirs[1] if theirs else [])]:
            parameter.grad = None
        out = forward(x)
        out.backward(towards)
        assert x.grad is not None
        made = [p.grad for p in theirs[1]] if theirs and name == "mixlora" else gradients(forward)  # type: ignore[arg-type]
        differences = [_difference(a, b) for a, b in zip([x.grad, *made], reference, strict=True)]  # type: ignore[list-item]
        found["ways"][name] |= {"output": _difference(out, wanted), "gradient": max(differences)}
    for number in range(ROUNDS):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            begun = time.thread_time()
            ways[name](x).backward(towards)
            found["ways"][name]["seconds"].append(time.thread_time() - begun)
    return found


def _difference(made: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest number."""
    made, wanted = made.detach(), wanted.detach()
    return float((made - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def plan(seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    return {f"block/{number}": measure for number in range(seeds)}


def report(runs: dict[str, Any]) -> list[str]:
    parts = list(runs.values())
    ways = parts[0]["ways"]
    least = {name: min(second for part in parts for second in part["ways"][name]["seconds"]) for name in ways}
    lines = [
        "## A feed-forward block with experts",
        "",
        f"Width {WIDTH}, inner width {INNER}, {TOKENS} tokens, {EXPERTS} experts, {CHOSEN} per token, rank {RANK},",
        f"fp32. Least CPU time of {sum(part['rounds'] for part in parts)} forward and backward passes; MiB kept for",
        "the backward pass; largest difference to whole blocks over the largest number, of output and gradients.",
        "",
        "| | ms | over whole blocks | kept (MiB) | output | gradients |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        differences = " | ".join(f"{way[key]:.0e}" if key in way else "" for key in ("output", "gradient"))
        lines.append(
            f"| {name} | {1000 * least[name]:.0f} | **{least[name] / least['whole blocks']:.2f}** | "
            f"{way['kept'] / 2**20:.1f} | {differences} |"
        )
    if "mixlora" not in ways:
        lines += ["", "The package `mixlora` was not installed."]
    else:
        lines += ["", f"Sorted over `mixlora`: {least['sorted'] / least['mixlora']:.2f}. "
                  "Sorted rows take time off, not memory: they keep the chosen rows apart."]  # fmt: skip
    return lines
