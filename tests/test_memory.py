"""Activation memory against what autograd's saved-tensor hooks see in a real step."""

import random
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree

import gtflops
from real_steps import raw_loss, train_only
from zoo import ZOO, Case


class Kept:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(case: Case) -> int:
    """Bytes of distinct memory that is kept after a real forward pass, besides parameters, buffers and the batch."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        value = raw_loss(case.model, case.batch, case.loss)
    there = [*case.model.parameters(), *case.model.buffers(), *pytree.tree_leaves(case.batch)]
    before = {tensor.untyped_storage()._cdata for tensor in there if isinstance(tensor, torch.Tensor)}
    storages = {storage._cdata: storage for kept in alive if (storage := kept.tensor.untyped_storage())}
    assert value.requires_grad
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in before)


@pytest.mark.parametrize(
    "name",
    ["llama-eager", "llama-sdpa", "opt-eager", "gpt2-sdpa", "bert-sdpa", "t5-eager", "resnet-train", "convnext",
     "transformer-encoder-train", "peft-lora", "in-place", "gpt2-eager-checkpointed", "checkpointed-blocks"],
)  # fmt: skip
def test_bytes_saved_for_backward(name: str) -> None:
    case = ZOO[name]()
    profile = gtflops.profile(case.model, case.batch, case.loss)
    names = [tensor.name for tensor in profile.tensors if tensor.has_gradient]
    draw = random.Random(5)
    for selection in [
        names,
        names[:1],
        names[-1:],
        *(draw.sample(names, draw.randint(1, len(names))) for _ in range(6)),
    ]:
        train_only(case.model, selection)
        assert profile.activation_bytes(selection) == pytest.approx(kept_by_autograd(case), rel=0.05), selection
    assert (profile.activation_bytes("none") == 0) == (profile.graph.always == ())
