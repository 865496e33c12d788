"""What PyTorch really executes in a step, to hold predictions against."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from gtflops import Profile
from gtflops.capture import call_model, loss_of
from gtflops.capture.dispatch import OperatorMode, describe_call
from gtflops.graph import GETITEM, Phase
from gtflops.operators import Call, Flops, FlopsByOutput, price


def train_only(model: torch.nn.Module, names: Collection[str]) -> None:
    """Let exactly the named tensors require gradients, and drop all gradients."""
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in names)
        tensor.grad = None


def counted_by_pytorch(model: torch.nn.Module, batch: Any, loss: Any = None) -> tuple[int, int]:
    """Matrix-product FLOPs of a real forward and of a real backward pass."""
    with FlopCounterMode(display=False) as counter:
        value = loss_of(call_model(model, batch), batch, loss)
        forward = counter.get_total_flops()
        value.backward()
    return forward, counter.get_total_flops() - forward


def shapes_of(call: Call) -> tuple[tuple[int, ...], ...]:
    """Of what goes in, without scratch memory (bytes), whose size is a back-end's own and unknown to a fake kernel."""
    return tuple(tensor.shape for tensor in call.tensors() if tensor.dtype != "uint8")


class PricedOperators(OperatorMode):
    """The multiset of operators that ran and cost something: op, input shapes, price of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        call = describe_call(func, args, kwargs, result)
        cost = price(call)
        assert cost is not None, call.op
        if isinstance(cost, FlopsByOutput):
            cost = cost.executed(call)
        if any(cost):
            self.seen[call.op.replace("_.", "."), shapes_of(call), cost] += 1


def executed_operators(model: torch.nn.Module, batch: Any, loss: Any = None) -> Counter[Any]:
    """The operators of a real step; of a forward pass alone where nothing requires a gradient."""
    for tensor in pytree.tree_leaves(batch):
        if isinstance(tensor, torch.Tensor):
            tensor.grad = None
    with PricedOperators() as operators:
        value = raw_loss(model, batch, loss)
        if value.requires_grad:
            value.backward()
    return operators.seen


def raw_loss(model: torch.nn.Module, batch: Any, loss: Any = None) -> torch.Tensor:
    """The loss, whether or not it requires a gradient."""
    outputs = call_model(model, batch)
    return outputs.loss if loss is None else loss(outputs, batch)


def predicted_operators(profile: Profile, names: Collection[str]) -> Counter[Any]:
    """The same multiset, from the profile's graph: the forward pass and the closure of the named tensors."""
    nodes = profile.graph.nodes
    needed = {index for index, node in enumerate(nodes) if node.phase is Phase.FORWARD}
    stack = [index for name in names if (index := profile.graph.gradients[name]) is not None]
    stack += profile.graph.always
    while stack:
        index = stack.pop()
        if index not in needed and nodes[index].phase in (Phase.BACKWARD, Phase.RECOMPUTE):
            needed.add(index)
            stack.extend(nodes[index].inputs)
    cost_of: dict[int, Flops] = {}
    for index in sorted(needed):
        node = nodes[index]
        operator = node.inputs[0] if node.call.op == GETITEM else index
        flops = Flops(*(int(column) for column in profile.prices[:, index]))
        before = cost_of.get(operator, Flops())
        cost_of[operator] = Flops(before.matmul + flops.matmul, before.other + flops.other)
    return Counter(
        (nodes[index].call.op.replace("_.", "."), shapes_of(nodes[index].call), cost)
        for index, cost in cost_of.items()
        if any(cost)
    )
