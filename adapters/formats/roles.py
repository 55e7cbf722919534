"""What the end of a key says that a tensor is.

...lora_A.weight   ...lora_down.weight   ...to_q_lora.down.weight     A          (and so on for B)
...lora_mid.weight                                                   the core between 1 x 1 kernels
...hada_w1_a  ...hada_t1  ...lokr_w1  ...lokr_w2_b  ...lokr_t2        LyCORIS
...diff                                                              a whole difference of weights
...lora_embedding_A   ...lora_embedding_B                              PEFT on a table of embeddings
...alpha   ...dora_scale   ...lora_magnitude_vector                  scale and magnitude
"""

from __future__ import annotations

import re
from typing import Literal

Role = Literal[
    "A", "B", "table_A", "table_B", "mid", "alpha", "magnitude", "dora_scale", "diff",
    "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2",
    "k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "kt",
]  # fmt: skip

_ROLES: dict[Role, tuple[str, ...]] = {
    "A": (
        r"\.lora_A(\.default)?\.weight$",
        r"\.lora_down\.weight$",
        r"(\.|_)lora\.down\.weight$",
        r"(?<=_lora[12])\.down\.weight$",
        r"\.lora_linear_layer\.down\.weight$",
    ),
    "B": (
        r"\.lora_B(\.default)?\.weight$",
        r"\.lora_up\.weight$",
        r"(\.|_)lora\.up\.weight$",
        r"(?<=_lora[12])\.up\.weight$",
        r"\.lora_linear_layer\.up\.weight$",
    ),
    "table_A": (r"\.lora_embedding_A(\.default)?$",),
    "table_B": (r"\.lora_embedding_B(\.default)?$",),
    "mid": (r"\.lora_mid\.weight$",),
    "alpha": (r"\.alpha$",),
    "magnitude": (r"\.lora_magnitude_vector(\.default)?(\.weight)?$",),
    "dora_scale": (r"\.dora_scale$",),
    "diff": (r"\.diff$",),
    "w1_a": (r"\.hada_w1_a$",),
    "w1_b": (r"\.hada_w1_b$",),
    "w2_a": (r"\.hada_w2_a$",),
    "w2_b": (r"\.hada_w2_b$",),
    "t1": (r"\.hada_t1$",),
    "t2": (r"\.hada_t2$",),
    "k1": (r"\.lokr_w1$",),
    "k1_a": (r"\.lokr_w1_a$",),
    "k1_b": (r"\.lokr_w1_b$",),
    "k2": (r"\.lokr_w2$",),
    "k2_a": (r"\.lokr_w2_a$",),
    "k2_b": (r"\.lokr_w2_b$",),
    "kt": (r"\.lokr_t2$",),
}
ROLES = tuple((re.compile(pattern), role) for role, patterns in _ROLES.items() for pattern in patterns)


def split_role(key: str) -> tuple[str, Role] | None:
    """``(module with its prefix, role)`` of a key, or None if it is not an adapter's key."""
    for pattern, role in ROLES:
        match = pattern.search(key)
        if match:
            return key[: match.start()], role
    return None
