"""Hypothesis: on random small modules the prediction is exact: branches, shared parameters, in-place writes,
checkpoints, custom Functions."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import gtflops
from real_steps import counted_by_pytorch, executed_operators, predicted_operators, train_only
from zoo import Asking, Whole

WIDTH = 4


class RandomNetwork(torch.nn.Module):
    """Steps over a list of activations: each reads one or two earlier ones and one of a few shared layers."""

    def __init__(self, num_layers: int, program: list[tuple[str, int, int, int]], outputs: list[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(WIDTH, WIDTH, bias=index % 2 == 0) for index in range(num_layers)
        )
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(num_layers))
        self.program, self.outputs = program, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for kind, layer, left, right in self.program:
            a, b = values[left % len(values)], values[right % len(values)]
            module, norm = self.layers[layer % len(self.layers)], self.norms[layer % len(self.norms)]
            if kind == "linear":
                values.append(module(a))
            elif kind == "norm":
                values.append(norm(a))
            elif kind == "add":
                values.append(a + module(b))
            elif kind == "gate":
                values.append(torch.sigmoid(a) * module(b))
            elif kind == "attend":
                values.append(torch.softmax(a @ b.T, dim=-1) @ module(b))
            elif kind == "weight":  # a parameter used as an activation
                values.append(a @ module.weight @ module.weight.T)
            elif kind == "checkpoint":  # a region that is run again in the backward pass
                values.append(
                    checkpoint(lambda x, y, m=module, n=norm: x + torch.sigmoid(m(n(y))), a, b, use_reentrant=False)
                )
            elif kind in ("whole", "asking"):
                function = Whole if kind == "whole" else Asking
                values.append(function.apply(a, module.weight))
            elif kind == "inplace":  # a write through a view
                copied = a.clone()
                copied[:, 1:3] = module(b)[:, :2]
                values.append(copied)
            else:
                values.append(torch.cat([a[:, :2], torch.relu(b)[:, 2:]], dim=1))
        return sum((values[index % len(values)].square().mean() for index in self.outputs), values[-1].sum())


KINDS = ["linear", "norm", "add", "gate", "attend", "weight", "inplace", "cat", "checkpoint", "whole", "asking"]

networks = st.builds(
    RandomNetwork,
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=9,
    ),
    st.lists(st.integers(0, 9), max_size=3),
)


def _loss(outputs: torch.Tensor, _: Any) -> torch.Tensor:
    return outputs


@settings(max_examples=250)
@given(networks, st.data())
def test_prediction_equals_execution(model: RandomNetwork, data: st.DataObject) -> None:
    x = torch.ones(3, WIDTH)
    try:
        profile = gtflops.profile(model, x, _loss)
    except gtflops.InputError as error:
        assert "needs no gradient" in str(error)  # the program used no layer
        return
    used = [tensor.name for tensor in profile.tensors if tensor.has_gradient]
    names = data.draw(st.lists(st.sampled_from(used), min_size=1, unique=True))
    train_only(model, names)
    step = profile.step_flops(names, ops="matmul")
    assert (step.forward, step.backward + step.recompute) == counted_by_pytorch(model, x, _loss)
    train_only(model, names)
    executed, predicted = executed_operators(model, x, _loss), predicted_operators(profile, names)
    assert executed == predicted


@settings(max_examples=60)
@given(networks)
def test_chain_costs_add_up(model: RandomNetwork) -> None:
    """The dw and dy of all tensors are the full backward pass, and the chain form is never below the exact cost."""
    try:
        profile = gtflops.profile(model, torch.ones(3, WIDTH), _loss)
    except gtflops.InputError:
        return
    full = profile.step_flops("all")
    assert int(profile.t_dw.sum() + profile.t_dy.sum()) == full.backward + full.recompute
    depth_costs = profile.t_dy.cumsum()
    for position, tensor in enumerate(profile.tensors):
        step = profile.step_flops([tensor.name])
        assert step.backward + step.recompute <= tensor.dw_flops + int(depth_costs[position])
