"""What torch.compile would run: held against the eager prediction, against hand counts, and against real runs."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

import gtflops
from gtflops.capture.compiled import compiled_step
from gtflops.compiled import CompiledStep
from gtflops.operators import Flops
from real_steps import counted_by_pytorch, train_only
from small_models import build, padded_batch
from zoo import ZOO

FAMILIES: dict[str, Callable[[str], Any]] = {
    "llama": lambda attention: build("llama", attention),
    "opt": lambda attention: build("opt", attention),
    "bert": lambda attention: ZOO[f"bert-{attention}"]().model,
    "t5": lambda attention: ZOO[f"t5-{attention}"]().model,
}
SLOW = ("t5-eager", "t5-sdpa", "bert-eager", "opt-eager", "llama-eager")
EVERY = [
    pytest.param(family, attention, marks=[pytest.mark.slow] if f"{family}-{attention}" in SLOW else [])
    for family in FAMILIES
    for attention in ("eager", "sdpa")
]


def selections(names: tuple[str, ...]) -> list[list[str]]:
    """All, first, last, and a random one."""
    draw = random.Random(11)
    return [list(names), [names[0]], [names[-1]], draw.sample(names, draw.randint(1, len(names)))]


@pytest.mark.parametrize(("family", "attention"), EVERY)
def test_matrix_products_are_those_of_the_eager_step(family: str, attention: str) -> None:
    """The partitioner recomputes none of them, for any selection; frozen tensors are frozen in what is compiled."""
    model, batch = FAMILIES[family](attention), padded_batch()
    profile = gtflops.profile(model, batch)
    for names in selections(profile.names)[:: 1 if attention == "eager" else 2]:
        train_only(model, names)
        compiled, step = compiled_step(model, batch), profile.step_flops(names, ops="matmul")
        assert (compiled.forward.matmul, compiled.backward.matmul) == (step.forward, step.backward), names
        assert compiled.recompute.matmul == 0
        assert set(compiled.trainable) == set(names)
        assert (compiled.graphs, compiled.graph_breaks, compiled.outside) == (1, (), Flops())
        assert compiled.unsupported == {}
    assert compiled.backward.matmul < profile.step_flops("all", ops="matmul").backward


def executed(model: torch.nn.Module, batch: Any) -> tuple[gtflops.ExecutedFlops, gtflops.ExecutedFlops]:
    """Forward and backward graphs as torch.compile really runs them on real tensors, operator by operator."""
    forward, backward = gtflops.ExecutedFlops(), gtflops.ExecutedFlops()

    def counting(counter: gtflops.ExecutedFlops) -> Any:
        def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                with counter:
                    return torch.fx.Interpreter(module).run(*args)

            return make_boxed_func(run)

        return compiler

    backend = aot_autograd(
        fw_compiler=counting(forward),
        bw_compiler=counting(backward),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    torch.compile(lambda model, batch: model(**batch).loss, backend=backend, fullgraph=True)(model, batch).backward()
    torch._dynamo.reset()
    return forward, backward


@pytest.mark.parametrize(("family", "attention"), EVERY)
def test_both_columns_are_those_of_a_real_compiled_step(family: str, attention: str) -> None:
    model, batch = FAMILIES[family](attention), padded_batch()
    names = [name for name, _ in model.named_parameters()]
    half = random.Random(5).sample(names, len(names) // 2)
    for trained in (names, half) if attention == "eager" else (half,):
        train_only(model, trained)
        predicted = compiled_step(model, batch)
        forward, backward = executed(model, batch)
        assert predicted.forward == forward.flops
        again = predicted.recompute
        assert Flops(predicted.backward.matmul + again.matmul, predicted.backward.other + again.other) == backward.flops
        assert (forward.unsupported, backward.unsupported, predicted.unsupported) == ({}, {}, {})


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.GELU(), torch.nn.Linear(4, 5, bias=False))


def sum_of(outputs: torch.Tensor, _: Any) -> torch.Tensor:
    return outputs.sum()


def test_recompute_by_hand() -> None:
    """Of gelu(x) = x / 2 (1 + erf(x / sqrt 2)) the backward graph runs the division, erf and sum again."""
    compiled = compiled_step(mlp(), torch.randn(7, 3), sum_of)
    products = 2 * 7 * (3 * 4 + 4 * 5)
    assert compiled.forward == Flops(products, 5 * 7 * 4 + 7 * 5)  # gelu, and the sum of the outputs
    assert compiled.recompute == Flops(0, 3 * 7 * 4)
    # Both dw and one dy; of gelu: half of the sum, exp(-x^2 / 2) / sqrt(2 pi) in 4, times x, plus, times gradient.
    assert compiled.backward == Flops(products + 2 * 7 * 4 * 5, 8 * 7 * 4)
    assert compiled.total == sum(compiled.forward) + sum(compiled.recompute) + sum(compiled.backward)


def test_a_checkpoint_is_recomputed_down_to_its_matrix_products() -> None:
    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.head = torch.nn.Linear(5, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False).tanh())

    compiled = compiled_step(Checkpointed(), torch.randn(7, 3), sum_of)
    # Gelu's gradient needs the block's first product again; nothing needs its second, tanh's output being saved.
    assert compiled.forward.matmul == 2 * 7 * (3 * 4 + 4 * 5 + 5 * 2)
    assert compiled.recompute.matmul == 2 * 7 * 3 * 4
    assert compiled.backward.matmul == 2 * compiled.forward.matmul - 2 * 7 * 3 * 4


def test_nothing_trained_is_a_forward_pass() -> None:
    compiled = compiled_step(mlp().requires_grad_(False), torch.randn(7, 3), sum_of)
    assert compiled.forward == Flops(2 * 7 * (3 * 4 + 4 * 5), 5 * 7 * 4 + 7 * 5)
    assert (compiled.trainable, compiled.backward, compiled.recompute) == ((), Flops(), Flops())


@torch.compiler.disable
def product(x: torch.Tensor) -> torch.Tensor:
    return x @ x.T


class Broken(torch.nn.Module):
    """Two layers of one class with a graph break in each, and a product that is not compiled."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            torch._dynamo.graph_break()
            return y.sin()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Layer(), self.Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(self.second(self.first(x)))


def test_graph_breaks_are_counted_and_what_runs_between_is_priced() -> None:
    model, x = Broken(), torch.randn(4, 4)
    profile = gtflops.profile(model, x, sum_of, graph="compiled")
    compiled, step = profile.compiled, profile.step_flops("all", ops="matmul")
    assert compiled is not None
    assert (compiled.forward.matmul, compiled.backward.matmul) == (step.forward, step.backward)
    assert compiled.outside.matmul == 3 * 2 * 4**3  # product: forward, and the gradients of both its arguments
    assert compiled.graphs == 5  # a linear and a sine twice, and the loss
    assert any("graph_break" in reason and "test_compiled.py" in reason for reason in compiled.graph_breaks)
    assert any("disable" in reason for reason in compiled.graph_breaks)
    assert any("breaks the step into 5 graphs" in note for note in profile.notes)
    assert compiled_step(model, x, sum_of) == compiled


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_the_random_states_and_the_users_compilations_stay(broken: bool) -> None:
    model: torch.nn.Module = Broken() if broken else torch.nn.Sequential(mlp(), torch.nn.BatchNorm1d(5))
    x = torch.randn(4, 4 if broken else 3)
    num_compiled = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal num_compiled
        num_compiled += 1
        return module.forward

    torch._dynamo.reset()
    by_user = torch.compile(model, backend=backend)
    by_user(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    states = torch.get_rng_state(), random.getstate()
    settings, compilations = dynamo_config.get_config_copy(), num_compiled
    counts = copy.deepcopy(counters)
    for _ in range(9):  # more often than dynamo compiles a function anew
        compiled_step(model, x, sum_of)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameters[name] is tensor and tensor.grad is None for name, tensor in model.named_parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (dynamo_config.get_config_copy(), counters) == (settings, counts)
    by_user(x)
    assert num_compiled == compilations
    by_user(x[:2])
    assert num_compiled > compilations  # another shape is still compiled, and not run eagerly
    torch._dynamo.reset()


def test_what_the_user_set_in_dynamo_does_not_change_the_answer() -> None:
    expected = compiled_step(mlp(), torch.randn(7, 3), sum_of)
    with torch.compiler.set_stance("force_eager"), dynamo_config.patch(disable=True, suppress_errors=True):
        assert compiled_step(mlp(), torch.randn(7, 3), sum_of) == expected
    with torch.no_grad():
        assert compiled_step(mlp(), torch.randn(7, 3), sum_of) == expected


def test_a_failure_of_dynamo_says_what_to_do_and_changes_nothing() -> None:
    class Failing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return self.linear(x) @ torch.ones(5, 5)
            return self.linear(x)

    model = Failing()
    x = torch.randn(2, 3)
    weight, state = model.linear.weight, torch.get_rng_state()
    with pytest.raises(gtflops.UnsupportedModelError, match=r"graph='eager', or keep .* torch\.compiler\.disable"):
        gtflops.profile(model, x, sum_of, graph="compiled")
    assert model.linear.weight is weight
    assert torch.equal(torch.get_rng_state(), state)
    assert gtflops.profile(model, x, sum_of).compiled is None


def test_by_name_saved_and_loaded(tmp_path: Path) -> None:
    FAMILIES["opt"]("eager").config.save_pretrained(tmp_path)
    profile = gtflops.profile(tmp_path, batch_size=1, seq_len=8, graph="compiled")
    profile.save(tmp_path / "profile.json")
    loaded = gtflops.Profile.load(tmp_path / "profile.json")
    assert isinstance(loaded.compiled, CompiledStep)
    assert loaded.compiled == profile.compiled
    step = loaded.step_flops(loaded.compiled.trainable, ops="matmul")
    assert (loaded.compiled.forward.matmul, loaded.compiled.backward.matmul) == (step.forward, step.backward)
    assert set(loaded.compiled.trainable) == set(loaded.names)


def test_the_models_flags_are_the_selection_in_force() -> None:
    model, batch = FAMILIES["opt"]("eager"), padded_batch()
    names = [name for name, _ in model.named_parameters() if "layers.2" in name]
    train_only(model, names)
    profile = gtflops.profile(model, batch, graph="compiled")
    assert profile.compiled is not None
    assert profile.compiled.trainable == tuple(names)
    assert (profile.compiled.forward.matmul, profile.compiled.backward.matmul) == counted_by_pytorch(model, batch)
    assert [name for name, tensor in model.named_parameters() if tensor.requires_grad] == names


def test_an_unknown_graph_is_refused() -> None:
    with pytest.raises(gtflops.InputError, match="expected 'eager' or 'compiled'"):
        gtflops.profile(mlp(), torch.randn(7, 3), sum_of, graph="fused")  # type: ignore[arg-type]


def test_a_checkpoint_with_dropout() -> None:
    """Its random numbers are drawn again: AOTAutograd keeps their state with operators of its own."""
    model, batch = build("opt"), padded_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = compiled_step(model, batch)
    assert compiled.unsupported == {}
    assert compiled.recompute.matmul > 0
