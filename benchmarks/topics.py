"""A classification bed: a tiny BERT that knows four topics, and rows that teach it the same topics badly.

Every topic draws its 12 words from a distribution of its own over 28 words (tokens 4 to 31). The model (two layers,
width 64) is trained until it classifies clean, balanced rows of the first wording, in a few seconds and always the same
way. An adapter then learns from a new wording (half the old distribution, half a new one), imbalanced 10 to 1, with
every fifth label wrong.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

TOPICS, WORDS, FIRST, LENGTH = 4, 32, 4, 12
SHARES = (10.0, 4.64, 2.15, 1.0)
"""How often the topics occur in the rows to learn from: 10 to 1 in equal ratios."""
WRONG = 0.2
TARGETS = ["query", "key", "value", "dense"]


def distributions(wording: str) -> Tensor:
    """(topics, words): the probabilities of the words in the "old" or the "new" wording."""
    generator = torch.Generator().manual_seed(11)
    old, other = (torch.rand(TOPICS, WORDS, generator=generator) ** 4 for _ in range(2))
    shares = old if wording == "old" else old / old.sum(1, keepdim=True) + other / other.sum(1, keepdim=True)
    shares[:, :FIRST] = 0
    return shares / shares.sum(1, keepdim=True)


def rows(count: int, wording: str, seed: int, poor: bool = False) -> dict[str, Tensor]:
    """``count`` rows as the model takes them; ``poor``: imbalanced and with wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.multinomial(torch.tensor(SHARES if poor else (1.0,) * TOPICS), count, True, generator=generator)
    ids = torch.multinomial(distributions(wording)[topics], LENGTH, True, generator=generator)
    if poor:
        wrong = torch.rand(count, generator=generator) < WRONG
        elsewhere = topics + torch.randint(1, TOPICS, (count,), generator=generator)
        topics = torch.where(wrong, elsewhere % TOPICS, topics)
    return {"input_ids": ids, "labels": topics}


def model() -> BertForSequenceClassification:
    """The model that knows the old wording, frozen."""
    made = _empty()
    made.load_state_dict(_learnt())
    return made.requires_grad_(False).eval()


def _empty() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            num_labels=TOPICS, pad_token_id=0,
        )
    )  # fmt: skip


@functools.cache
def _learnt(steps: int = 200) -> dict[str, Tensor]:
    made = _empty().train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for step in range(steps):
        made(**rows(48, "old", 500 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.state_dict()


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(rows, topics), in evaluation mode."""
    model.eval()
    found: Tensor = model(**batch).logits
    return found


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the topics of the share of rows recognised."""
    hits = logits.argmax(-1) == labels
    return sum(float(hits[labels == topic].float().mean()) for topic in range(TOPICS)) / TOPICS
