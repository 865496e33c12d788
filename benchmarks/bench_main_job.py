"""Side by side in one run; pytest-benchmark prints the medians, and each one's ratio to the best of its group."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import gtflops
from gtflops.capture import architecture
from published_recursion import published_selection

SMOLLM2, OPT = "HuggingFaceTB/SmolLM2-135M", "facebook/opt-2.7b"
TRACED = [SMOLLM2, OPT, "google/flan-t5-xl", "meta-llama/Llama-2-70b"]


def fake_step(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], FakeTensorMode]:
    """A model and a batch of 4 x 512 on fake CPU tensors: no weights, real shapes."""
    built = architecture(name, batch_size=4, seq_len=512)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = built.model.to_empty(device="cpu")
        model.tie_weights()
        batch = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in built.batch.items()}
    return model, batch, mode


@pytest.fixture(scope="module", params=TRACED, ids=lambda name: name.rpartition("/")[2])
def step(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, fake_step(request.param)


@pytest.fixture(scope="module")
def opt() -> gtflops.Profile:
    return gtflops.profile(OPT, batch_size=4, seq_len=512)


def counting_run(model: torch.nn.Module, batch: dict[str, torch.Tensor], mode: FakeTensorMode) -> int:
    """What PyTorch offers: one forward and backward pass under its counter, for one selection."""
    with mode, FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
        model.zero_grad()
    return int(counter.get_total_flops())


def test_trace_by_gtflops(benchmark: Any, step: tuple[str, Any]) -> None:
    name, (model, batch, _) = step
    benchmark.group = f"trace {name}, 4 x 512"
    benchmark.pedantic(lambda: gtflops.profile(model, batch), rounds=5, warmup_rounds=1)


def test_trace_by_flop_counter_mode(benchmark: Any, step: tuple[str, Any]) -> None:
    name, (model, batch, mode) = step
    benchmark.group = f"trace {name}, 4 x 512"
    benchmark.pedantic(lambda: counting_run(model, batch, mode), rounds=5, warmup_rounds=1)


def in_a_process(benchmark: Any, *arguments: str) -> None:
    """A command from its start to its end, imports included; and the processor's time, which is steadier."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    rounds = 3
    command = [sys.executable, *arguments]
    benchmark.pedantic(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), rounds=rounds, warmup_rounds=0
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.extra_info["processor seconds:"] = seconds / rounds


def test_command_profile(benchmark: Any) -> None:
    """At most 1.3 times the next one."""
    benchmark.group = "gtflops profile facebook/opt-2.7b, a process"
    in_a_process(benchmark, "-m", "gtflops", "profile", OPT)


def test_command_bare_trace(benchmark: Any) -> None:
    benchmark.group = "gtflops profile facebook/opt-2.7b, a process"
    in_a_process(benchmark, str(Path(__file__).with_name("bare_trace.py")), OPT)


def test_command_help(benchmark: Any) -> None:
    """Under 0.3 s."""
    benchmark.group = "gtflops --help, a process"
    in_a_process(benchmark, "-m", "gtflops", "--help")


def test_query_by_step_flops(benchmark: Any, opt: gtflops.Profile) -> None:
    benchmark.group = "FLOPs of one selection, OPT-2.7B"
    mask = np.random.default_rng(0).random(len(opt.names)) < 0.3
    opt.step_flops(mask)
    benchmark(opt.step_flops, mask)


def test_query_of_a_thousand_in_one_call(benchmark: Any, opt: gtflops.Profile) -> None:
    benchmark.group = "FLOPs of 1,000 selections, OPT-2.7B"
    benchmark(opt.step_flops_of_many, np.random.default_rng(0).random((1000, len(opt.names))) < 0.3)


def test_query_by_flop_counter_mode(benchmark: Any) -> None:
    benchmark.group = "FLOPs of one selection, OPT-2.7B"
    model, batch, mode = fake_step(OPT)
    for parameter, chosen in zip(model.parameters(), np.random.default_rng(0).random(516) < 0.3, strict=True):
        parameter.requires_grad_(bool(chosen))
    benchmark.pedantic(lambda: counting_run(model, batch, mode), rounds=3, warmup_rounds=1)


def test_other_shape_by_at(benchmark: Any, opt: gtflops.Profile) -> None:
    benchmark.group = "profile of another length, OPT-2.7B"
    for length in (768, 300, 400, 500):  # the traces that determine the polynomials
        opt.at(seq_len=length)
    lengths = iter(range(301, 768))
    benchmark.pedantic(lambda: opt.at(seq_len=next(lengths)).full_flops, rounds=20)


def test_other_shape_by_a_trace(benchmark: Any, opt: gtflops.Profile) -> None:
    benchmark.group = "profile of another length, OPT-2.7B"
    benchmark.pedantic(lambda: gtflops.profile(OPT, batch_size=4, seq_len=640).full_flops, rounds=3)


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("solver", ["gtflops", "published recursion in NumPy, 1,000 steps"])
def test_solver(benchmark: Any, opt: gtflops.Profile, solver: str, budget: float) -> None:
    benchmark.group = f"selection, OPT-2.7B, budget {budget}"
    importance = np.random.default_rng(1).gamma(0.5, 1.0, len(opt.names))
    capacity = int(budget * opt.full_flops) - opt.forward_flops
    solve: Callable[[], np.ndarray] = {
        "gtflops": lambda: gtflops.knapsack(opt.t_dw, opt.t_dy, importance, capacity).mask,
        "published recursion in NumPy, 1,000 steps": lambda: published_selection(
            opt.t_dw, opt.t_dy, importance, capacity
        ),
    }[solver]
    mask = benchmark(solve)
    best = gtflops.knapsack(opt.t_dw, opt.t_dy, importance, capacity)
    benchmark.extra_info["importance, share of the optimum:"] = float(importance[mask].sum() / best.value)
    benchmark.extra_info["step, share of the budget:"] = opt.step_flops(mask).total / (budget * opt.full_flops)


def smollm2() -> tuple[Any, dict[str, torch.Tensor]]:
    """SmolLM2-135M with random weights and 2 x 128 tokens: real tensors."""
    torch.manual_seed(0)
    built = architecture(SMOLLM2, batch_size=2, seq_len=128)
    model = built.model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    ids = torch.randint(0, 49152, (2, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="module")
def training() -> tuple[Any, Any, Any]:
    """SmolLM2-135M, one step of AdamW made."""
    model, batch = smollm2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    one_step(model, batch, optimizer)
    return model, batch, optimizer


def one_step(model: Any, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_importance_by_gtflops(benchmark: Any, training: tuple[Any, Any, Any]) -> None:
    benchmark.group = "importance, SmolLM2-135M, 2 x 128"
    model, batch, optimizer = training
    benchmark.pedantic(lambda: gtflops.measure_importance(model, [batch], optimizer), rounds=5, warmup_rounds=1)


def test_one_training_step(benchmark: Any, training: tuple[Any, Any, Any]) -> None:
    benchmark.group = "importance, SmolLM2-135M, 2 x 128"
    benchmark.pedantic(lambda: one_step(*training), rounds=5, warmup_rounds=1)
