"""What a language training will need, beside what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from pipelines.language.loading import open_model
from studio.training import estimate as estimates
from studio.training.language.layers import add_adapter
from tests.language.conftest import settings


@pytest.mark.parametrize(("family", "task"), [("llama", "causal"), ("wide", "causal")])
def test_a_real_step_keeps_what_was_estimated(family, task, bases, chats):
    chosen = settings(bases(family), chats, task=task)
    work = estimates.look_at_language(chosen, "fp32")
    base = open_model(str(bases(family)), task).model
    assert f"counted with {chosen.max_length} tokens" in work.remark
    assert work.parameters == {"model": sum(p.numel() for p in base.parameters())}
    base.config.use_cache = False
    model = add_adapter(base, chosen).train()
    assert work.learnt == sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(chosen.batch_size, chosen.max_length, dtype=torch.long)
        model(input_ids=ids).logits.float().square().mean()
    assert work.kept == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.1)


def test_epochs_count_the_rows(bases, chats):
    chosen = settings(bases("llama"), chats, epochs=3, batch_size=4)
    rows = len(chats.read_text().splitlines())
    assert estimates.steps(chosen) == -(-3 * rows // 4)
