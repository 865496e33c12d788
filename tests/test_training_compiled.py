"""torch.compile: compiled layers stay compiled, selections of layers need four graphs, others are warned of."""

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import gtflops
from small_models import CONFIGS, padded_batch

LAYERS = 6


def compiled_by_layer() -> tuple[Any, CompileCounterWithBackend]:
    """A model, and the backend that counts the graphs that are compiled of it."""
    torch._dynamo.reset()
    config = CONFIGS["llama"]()
    config.num_hidden_layers = LAYERS
    config.use_cache = False  # a cache in training has the number of the layer in its graph
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    backend = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model, backend


def test_selections_of_layers_need_four_graphs_in_all() -> None:
    model, backend = compiled_by_layer()
    batch = padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept = torch.Generator().manual_seed(0)

    def some_layers(profile: gtflops.Profile, step: int) -> list[str]:
        chosen = torch.rand(LAYERS, generator=kept) < 0.5
        chosen[step % LAYERS] = True
        outside = ["embed", "lm_head"] if step % 2 else []
        return [
            name
            for name in profile.names
            if any(part in name for part in outside)
            or any(f"layers.{layer}." in name for layer in range(LAYERS) if chosen[layer])
        ]

    def train(steps: int, **options: Any) -> gtflops.GreenTrainer:
        model.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = gtflops.GreenTrainer(model, optimizer, batch, every=1, granularity="layer", **options)
        trainer.fit([batch] * steps)
        return trainer

    train(12, choose=some_layers)
    assert backend.frame_count == 4
    train(4, budget=0.7)
    train(2, budget=0.9)
    assert backend.frame_count == 4


@pytest.mark.parametrize("kept", [["0.weight"], ["2.weight"], ["4.weight"], ["0.weight", "4.weight"]])
def test_a_compiled_backward_pass_leaves_frozen_work_out(kept: list[str]) -> None:
    """Its matrix products are those of the profile, which are as many as eager PyTorch executes."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)
    )
    batch, flops = torch.randn(5, 8), []

    def products(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.mm.default:
                (rows, inner), (_, columns) = (side.meta["val"].shape for side in node.args)
                flops.append(2 * rows * inner * columns)
        return make_boxed_func(graph.forward)

    planned = gtflops.profile(model, batch, lambda y, _: y.square().mean()).step_flops(kept, ops="matmul")
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in kept)
    compiled = torch.compile(
        model, backend=aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=products)
    )
    compiled(batch).square().mean().backward()
    assert sum(flops) == planned.backward > 0


def test_tracing_measuring_and_counting_leave_layers_compiled() -> None:
    """Met first under a dispatch mode, dynamo would skip them from then on, without a word."""
    model, backend = compiled_by_layer()
    batch = padded_batch()
    eager = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").train()
    eager.load_state_dict(model.state_dict())
    profile = gtflops.profile(model, batch)
    assert profile.full_flops == gtflops.profile(eager, batch).full_flops
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    measured = gtflops.measure_importance(model, [batch], optimizer)
    assert measured == gtflops.measure_importance(eager, [batch], torch.optim.SGD(eager.parameters(), lr=1.0))
    with gtflops.ExecutedFlops() as executed:
        model(**batch).loss.backward()
    assert executed.total == profile.full_flops
    assert backend.frame_count == 0
    model(**batch).loss.backward()
    assert backend.frame_count > 0


def test_what_would_compile_again_and_again_is_warned_of() -> None:
    model, _ = compiled_by_layer()
    batch, optimizer = padded_batch(), torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match=r"'model.layers.0' is compiled and granularity is 'tensor'"):
        gtflops.GreenTrainer(model, optimizer, batch, 0.7)
    model.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="the model is compiled as a whole"):
        gtflops.GreenTrainer(model, optimizer, batch, 0.7, granularity="layer")
