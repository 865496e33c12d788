"""The promise: for any selection, what is predicted is what PyTorch executes, to the FLOP and the operator."""

import random

import pytest
import torch

import gtflops
from real_steps import counted_by_pytorch, executed_operators, predicted_operators, train_only
from small_models import CONFIGS, build, padded_batch


def selections(names: tuple[str, ...], number: int) -> list[list[str]]:
    """All, first, last, one, and ``number`` random subsets of every size."""
    draw = random.Random(7)
    fixed = [list(names), [names[0]], [names[-1]], [draw.choice(names)]]
    return fixed + [draw.sample(names, draw.randint(1, len(names))) for _ in range(number)]


@pytest.mark.parametrize("family", CONFIGS)
def test_matrix_products_equal_pytorchs_counter(family: str) -> None:
    model, batch = build(family), padded_batch()
    profile = gtflops.profile(model, batch)
    assert profile.unsupported == ()
    for names in selections(profile.names, 20):
        train_only(model, names)
        step = profile.step_flops(names, ops="matmul")
        assert (step.forward, step.backward) == counted_by_pytorch(model, batch), names


@pytest.mark.parametrize(
    ("family", "attention"), [(family, attention) for family in CONFIGS for attention in ("eager", "sdpa")]
)
def test_operators_equal_the_executed_ones(family: str, attention: str) -> None:
    if (family, attention) == ("bloom", "sdpa"):
        attention = "eager"  # transformers has no SDPA for BLOOM
    model, batch = build(family, attention), padded_batch()
    profile = gtflops.profile(model, batch)
    for names in selections(profile.names, 5):
        train_only(model, names)
        executed = executed_operators(model, batch)
        predicted = predicted_operators(profile, names)
        assert executed - predicted == predicted - executed, names
        total = sum(sum(cost) * count for (_, _, cost), count in executed.items())
        assert profile.step_flops(names).total == total
        train_only(model, names)
        with gtflops.ExecutedFlops() as counted:
            model(**batch).loss.backward()
        assert (sum(counted.flops), counted.unsupported) == (total, {})


@pytest.mark.parametrize("family", ["llama-tied", "opt"])
def test_evaluation_mode_and_bfloat16(family: str) -> None:
    model, batch = build(family).eval().to(torch.bfloat16), padded_batch()
    profile = gtflops.profile(model, batch)
    for names in selections(profile.names, 3):
        train_only(model, names)
        executed, predicted = executed_operators(model, batch), predicted_operators(profile, names)
        assert executed == predicted


def test_every_gradient_of_the_graph_is_the_one_autograd_computes() -> None:
    """The torch.fx graph is not only counted: run as a program, it gives autograd's gradients."""
    from gtflops.capture import trace

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 2))
    x = torch.randn(5, 4)
    captured = trace(model, x, lambda y, _: y.square().mean())
    graph = captured.to_fx()
    nodes = list(graph.nodes)
    graph.output(tuple(nodes[position] for position in captured.gradients.values()))
    program = torch.fx.GraphModule(torch.nn.Module(), graph)
    computed = program(*model.parameters(), x)
    model(x).square().mean().backward()
    for gradient, (name, tensor) in zip(computed, model.named_parameters(), strict=True):
        torch.testing.assert_close(gradient, tensor.grad, msg=name)
