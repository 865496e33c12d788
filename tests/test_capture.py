"""Capture: what is recorded, what is left alone, and what is refused with a reason."""

import copy
import gc
import io
import itertools
import random
import socket
import threading
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode

import gtflops
from gtflops.graph import Phase
from real_steps import executed_operators, predicted_operators, train_only
from small_models import build, padded_batch
from zoo import ZOO

Output = namedtuple("Output", "loss")

ATTRIBUTES = ("training", "calls", "seen", "cache", "total", "recent", "flag")


def squared(outputs: torch.Tensor, _: Any) -> torch.Tensor:
    return outputs.square().mean()


class Restless(torch.nn.Module):
    """Changes everything that a forward can change: buffers, attributes, lists, random states."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.calls = 0
        self.seen: list[torch.Tensor] = []
        self.cache: dict[str, Any] = {"nested": {"list": [1]}}
        self.total = torch.zeros(1)
        self.recent: deque[torch.Tensor] = deque(maxlen=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.linear(x))
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.calls += 1
        self.total += 1
        self.recent.append(y.detach())
        self.cache["nested"]["list"].append(y.detach())
        self.seen.append(y.detach())
        self.cache["y"] = y.detach()
        self.flag = random.random() + float(np.random.rand())
        return torch.nn.functional.dropout(y)


def state_of(model: torch.nn.Module, batch: Any) -> Any:
    """Everything that must not change, by value and by identity."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "requires": {name: tensor.requires_grad for name, tensor in model.named_parameters()},
        "gradients": {
            name: None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
            for name, tensor in model.named_parameters()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: copy.deepcopy(value) for key, value in vars(module).items() if key in ATTRIBUTES}
            for name, module in model.named_modules()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "batch": copy.deepcopy(batch),
        "rng": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), gc.isenabled()),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, (list, tuple, deque)):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


def test_the_model_is_left_bit_identical() -> None:
    model, batch = Restless(), torch.randn(5, 4)
    model.linear.bias.requires_grad_(False)
    model(batch).sum().backward()
    model.norm.eval()
    model.linear.weight.register_hook(lambda gradient: gradient)
    before = state_of(model, batch)
    profile = gtflops.profile(model, batch, squared)
    assert_same(before, state_of(model, batch))
    assert profile.step_flops("all").backward > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Any) -> None:
    model, batch = torch.nn.Linear(4, 4), torch.randn(5, 4)
    expected = gtflops.profile(model, batch, squared).full_flops
    with mode():
        assert gtflops.profile(model, batch, squared).full_flops == expected


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    class Fails(Restless):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"after {super().forward(x).shape}")

    model, batch = Fails(), torch.randn(5, 4)
    before = state_of(model, batch)
    with pytest.raises(gtflops.InputError, match="after"):
        gtflops.profile(model, batch, squared)
    assert_same(before, state_of(model, batch))


def test_real_fake_and_meta_parameters_cost_the_same() -> None:
    batch = padded_batch()
    real = gtflops.profile(build("llama"), batch)
    with torch.device("meta"):
        meta = gtflops.profile(build("llama"), batch)
    with FakeTensorMode():
        fake_model = build("llama")
    fake = gtflops.profile(fake_model, batch)
    for profile in (meta, fake):
        assert profile.names == real.names
        assert profile.full_flops == real.full_flops
        assert (profile.t_dw == real.t_dw).all()


def test_batches_of_every_form() -> None:
    class TwoInputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
            return Output(loss=self.linear(x if y is None else x + y).sum())

    model, x = TwoInputs(), torch.randn(2, 3)
    from transformers import BatchEncoding

    with_addition = {
        gtflops.profile(model, batch).full_flops
        for batch in ((x, x), [x, x], {"x": x, "y": x}, BatchEncoding({"x": x, "y": x}))
    }
    assert len(with_addition) == 1
    assert gtflops.profile(model, x).full_flops == with_addition.pop() - 6


def test_dead_forward_operators_are_paid_for() -> None:
    """Eager PyTorch executes what nobody uses, so it costs: make_fx would drop it."""

    class Dead(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x @ x.T
            return super().forward(x)

    step = gtflops.profile(Dead(4, 4, bias=False), torch.ones(3, 4), squared).step_flops("all", ops="matmul")
    assert step.forward == 2 * 3 * 4 * 4 + 2 * 3 * 4 * 3
    assert step.backward == 2 * 3 * 4 * 4


def test_nodes_bear_their_modules() -> None:
    profile = gtflops.profile(build("llama"), padded_batch())
    by_phase: dict[Phase, set[str]] = {Phase.FORWARD: set(), Phase.BACKWARD: set()}
    for node in profile.graph.nodes:
        if node.call.op == "aten.mm.default":
            by_phase[node.phase].add(node.module)
    linear = {name for name, module in build("llama").named_modules() if isinstance(module, torch.nn.Linear)}
    assert by_phase[Phase.FORWARD] == by_phase[Phase.BACKWARD] == linear


def test_the_graph_as_networkx() -> None:
    import networkx

    profile = gtflops.profile(build("gpt2"), padded_batch())
    digraph = profile.graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(digraph)
    assert digraph.number_of_nodes() == len(profile.graph.nodes)
    gradient = profile.graph.gradients["transformer.wpe.weight"]
    parameter = next(index for index, node in enumerate(profile.graph.nodes) if node.name == "transformer.wpe.weight")
    assert digraph.nodes[gradient]["outputs"] == (profile.graph.nodes[parameter].call.output,)
    ancestors = networkx.ancestors(digraph, gradient) | {gradient}
    backward = sum(
        int(profile.prices[:, index].sum()) for index in ancestors if digraph.nodes[index]["phase"] == "backward"
    )
    assert profile.step_flops(["transformer.wpe.weight"]).backward == backward


# --- bad input --------------------------------------------------------------------------------------------------


def test_a_batch_that_the_model_refuses() -> None:
    with pytest.raises(gtflops.InputError, match=r"Linear refused the batch float32\[2, 5\].*linear\.py:") as raised:
        gtflops.profile(torch.nn.Linear(4, 4), torch.ones(2, 5), squared)
    assert "expected a mapping" in str(raised.value)


def test_a_loss_that_is_not_scalar() -> None:
    with pytest.raises(gtflops.InputError, match=r"shape \(2, 4\), expected a scalar"):
        gtflops.profile(torch.nn.Linear(4, 4), torch.ones(2, 4), lambda y, _: y)


def test_a_loss_that_needs_no_gradient() -> None:
    with pytest.raises(gtflops.InputError, match="needs no gradient"):
        gtflops.profile(torch.nn.Linear(4, 4), torch.ones(2, 4), lambda y, _: y.detach().sum())


def test_no_loss_at_all() -> None:
    batch = padded_batch()
    del batch["labels"]
    with pytest.raises(gtflops.InputError, match=r"\.loss None, expected a scalar tensor; put labels"):
        gtflops.profile(build("llama"), batch)


def test_a_model_without_parameters() -> None:
    with pytest.raises(gtflops.InputError, match="ReLU has no floating-point parameters"):
        gtflops.profile(torch.nn.ReLU(), torch.ones(2, 4), squared)


class DependsOnData(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.sum() > 0:  # the line that the error must name
            y = y * 2
        return y


class DependsOnShape(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y[y > 0]  # as many as there are


@pytest.mark.parametrize(("model", "code"), [(DependsOnData, "if y.sum() > 0"), (DependsOnShape, "return y[y > 0]")])
def test_data_dependent_control_flow_names_the_line(model: type[torch.nn.Linear], code: str) -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(code))
    with pytest.raises(gtflops.UnsupportedModelError) as raised:
        gtflops.profile(model(4, 4), torch.ones(2, 4), squared)
    assert f"{__file__}:{number}: {code}" in str(raised.value)


def test_a_loop_over_experts_is_refused_with_what_would_work() -> None:
    case = ZOO["mixtral-eager"]()
    case.model.set_experts_implementation("eager")  # type: ignore[operator]
    with pytest.raises(gtflops.UnsupportedModelError, match=r'set_experts_implementation\("grouped_mm"\)'):
        gtflops.profile(case.model, case.batch)


def test_input_gradients_run_whatever_is_trained() -> None:
    """enable_input_require_grads makes the backward run down to the embedding, whatever is trained."""
    model, batch = build("llama"), padded_batch()
    without = gtflops.profile(model, batch)
    model.enable_input_require_grads()
    profile = gtflops.profile(model, batch)
    assert any("enable_input_require_grads" in note for note in profile.notes)
    activations = without.step_flops(["model.embed_tokens.weight"], ops="matmul").backward
    assert profile.step_flops("none", ops="matmul").backward == activations
    assert profile.full_flops == without.full_flops
    head = profile.names[0]
    assert profile.step_flops([head]).total > without.step_flops([head]).total
    with pytest.raises(gtflops.InfeasibleBudgetError, match="below what runs whatever is trained"):
        gtflops.select(profile, dict.fromkeys(profile.names, 1.0), budget=0.4)
    selection = gtflops.select(profile, dict.fromkeys(profile.names, 1.0), budget=0.8)
    assert selection.flops <= 0.8 * profile.full_flops


def test_leaves_that_are_no_parameters() -> None:
    """A soft prompt kept as a plain tensor, or a tensor made to require a gradient in the forward."""

    class Prompted(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.prompt = torch.ones(4, requires_grad=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.prompt)

    class Made(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.zeros(4, requires_grad=True))

    for model in (Prompted(), Made(4, 4)):
        profile = gtflops.profile(model, torch.ones(2, 4), squared)
        for names in ([], ["bias"], ["weight", "bias"]):
            train_only(model, names)
            if isinstance(model, Prompted):
                model.prompt.grad = None
            assert predicted_operators(profile, names) == executed_operators(model, torch.ones(2, 4), squared)
        assert profile.step_flops("none", ops="matmul").backward == 2 * 2 * 4 * 4


def test_what_the_trace_cannot_know_is_noted() -> None:
    model = build("llama", "sdpa")
    model.lm_head.weight.register_hook(lambda gradient: gradient * 2)
    notes = " ".join(gtflops.profile(model, padded_batch()).notes)
    assert "asks for values of the batch" in notes
    assert "first lm_head.weight" in notes


def test_a_fast_path_is_noted() -> None:
    """In evaluation TransformerEncoderLayer runs as one operator where nothing in it requires a gradient."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    notes = " ".join(gtflops.profile(layer, torch.ones(2, 3, 8), squared).notes)
    assert "set_fastpath_enabled" in notes
    notes = " ".join(gtflops.profile(layer.train(), torch.ones(2, 3, 8), squared).notes)
    assert "set_fastpath_enabled" not in notes


def test_code_that_asks_requires_grad_is_noted() -> None:
    class Asking(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sin() if self.weight.requires_grad else x)

    (note,) = gtflops.profile(Asking(4, 4), torch.ones(2, 4), squared).notes
    assert f"{__file__}:" in note


def test_lazy_and_inference_tensors() -> None:
    with pytest.raises(gtflops.InputError, match="'weight' has no shape yet"):
        gtflops.profile(torch.nn.LazyLinear(4), torch.ones(2, 4), squared)
    with torch.inference_mode():
        model = torch.nn.Linear(4, 4)
    expected = gtflops.profile(torch.nn.Linear(4, 4), torch.ones(2, 4), squared)
    assert gtflops.profile(model, torch.ones(2, 4), squared).full_flops == expected.full_flops


def test_a_custom_function_that_is_neither_whole_nor_as_asked_is_noted() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight = ctx.saved_tensors
            if ctx.needs_input_grad == (True, False):
                gradient = gradient * 2.0
            return gradient @ weight.T, x.T @ gradient

    class Custom(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x.sin() * self.bias, self.weight)

    profile = gtflops.profile(Custom(4, 4), torch.ones(2, 4), squared)
    assert ["Function Product computes neither" in note for note in profile.notes] == [True]
    assert gtflops.profile(torch.nn.Linear(4, 4), torch.ones(2, 4), squared).notes == ()


def test_a_custom_function_that_sums_its_gradients_up_in_place() -> None:
    """As fused losses do, tile by tile; what is asked for is the buffer, whose last write is what it costs."""

    class Tiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            x, weight = ctx.saved_tensors
            dx, dw = (torch.zeros_like(one) if ctx.needs_input_grad[i] else None for i, one in enumerate((x, weight)))
            for tile in (slice(0, 2), slice(2, 4)):
                scaled = gradient[:, tile] * 2.0
                if dx is not None:
                    dx.addmm_(scaled, weight[:, tile].T)
                if dw is not None:
                    dw[:, tile].addmm_(x.T, scaled)
            return dx, dw

    class Custom(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Tiled.apply(x.sin() * self.bias, self.weight)

    model = Custom(4, 4)
    profile = gtflops.profile(model, torch.ones(2, 4), squared)
    assert profile.notes == ()
    for names in (["bias"], ["weight"], ["bias", "weight"]):
        train_only(model, names)
        assert predicted_operators(profile, names) == executed_operators(model, torch.ones(2, 4), squared)


def test_a_folded_product_is_noted() -> None:
    """Torch multiplies by a frozen matrix as a batch of products where it is one product if trained."""
    model = torch.nn.Linear(4, 4, bias=False)
    x = torch.ones(2, 3, 4).transpose(0, 1)
    profile = gtflops.profile(model, x, squared)
    assert ["another name, at the same FLOPs" in note for note in profile.notes] == [True]
    assert gtflops.profile(model, x.contiguous(), squared).notes == ()


def test_an_output_that_is_a_list_of_tensors() -> None:
    """As the weight gradients of cuDNN's recurrent layers: what reads one depends on the operator that made it."""

    @torch.library.custom_op("gtflops_test::halves", mutates_args=())
    def halves(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x.sum(), [x[:1].clone(), x[1:].clone()]

    @halves.register_fake
    def _(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x.new_empty(()), [torch.empty_like(x[:1]), torch.empty_like(x[1:])]

    class Halving(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(halves(x)[1][1])

    graph = gtflops.profile(Halving(4, 4), torch.ones(3, 4), squared).graph
    product = next(node for node in graph.nodes if node.call.op == "aten.addmm.default")
    (element,) = [graph.nodes[index] for index in product.inputs if graph.nodes[index].call.op == "getitem"]
    assert (element.call.args, element.call.output.shape) == ((1,), (2, 4))
    (part,) = [graph.nodes[index] for index in element.inputs]
    assert graph.nodes[part.inputs[0]].call.op == "gtflops_test.halves.default"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = lambda y: super(Checkpointed, self).forward(y).relu()  # noqa: E731
            return torch.utils.checkpoint.checkpoint(inside, super().forward(x), use_reentrant=use_reentrant)

    model, x = Checkpointed(4, 4), torch.ones(2, 4)
    if use_reentrant:
        with pytest.raises(gtflops.UnsupportedModelError, match="use_reentrant=False"):
            gtflops.profile(model, x, squared)
        return
    step = gtflops.profile(model, x, squared).step_flops("all")
    product, bias, relu = 2 * 2 * 4 * 4, 2 * 4, 2 * 4
    assert step.recompute == product + bias + relu  # relu saves its result, so the region runs to its end
    assert step.total == step.forward + step.backward + step.recompute


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
def test_a_trace_that_fails_anywhere_changes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator of this number fails; in the forward, the backward, or the recomputation."""
    from gtflops.capture.recording import Recorder

    case = ZOO["llama-sdpa-checkpointed"]()
    model, batch = case.model, case.batch
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    flags = [tensor.requires_grad for tensor in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled(), gc.isenabled()
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    observed = itertools.count()
    observe = Recorder.observe

    def failing(self: Any, *args: Any) -> None:
        if next(observed) == 10 * count:
            raise RuntimeError("chosen to fail")
        observe(self, *args)

    monkeypatch.setattr(Recorder, "observe", failing)
    with pytest.raises(gtflops.GtflopsError, match="chosen to fail"):
        gtflops.profile(model, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert attributes == {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert flags == [tensor.requires_grad for tensor in model.parameters()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), torch.is_grad_enabled(), gc.isenabled())
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter
    assert torch.overrides._get_current_function_mode() is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    monkeypatch.undo()
    assert gtflops.profile(model, batch).full_flops


def test_values_of_the_batch_decide_branches() -> None:
    """As in a real step: whether there is padding, where the last token is, what a mask selects."""

    class Branching(torch.nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found = super().forward(tokens)
            if (tokens == 0).any():
                found = found.masked_fill((tokens == 0)[..., None], 0.0).sin()
            return found[torch.arange(len(tokens)), (tokens != 0).sum(dim=1) - 1][: int(tokens.max())]

    model = Branching(9, 4)
    for tokens in (torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 1]])):
        profile = gtflops.profile(model, tokens, squared)
        train_only(model, ["weight"])
        assert predicted_operators(profile, ["weight"]) == executed_operators(model, tokens, squared)
        assert any("asks for values of the batch" in note for note in profile.notes)


def test_values_that_are_overwritten_are_forgotten() -> None:
    """A tensor with values that is written into from one without cannot keep them: the trace falls back on shapes."""

    class Writing(torch.nn.Linear):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask = mask.clone()
            mask.copy_(x.sum(dim=1) > 0)
            return super().forward(x)[torch.where(mask, 0, 1)]

    model, batch = Writing(4, 4), (torch.ones(2, 4), torch.tensor([True, False]))
    profile = gtflops.profile(model, batch, squared)
    train_only(model, ["weight"])
    assert predicted_operators(profile, ["weight"]) == executed_operators(model, batch, squared)
    assert batch[1].tolist() == [True, False]


def test_unknown_model_names_suggest_known_ones() -> None:
    with pytest.raises(gtflops.InputError, match=r"unknown model 'facebook/opt-2.8b'.*facebook/opt-2.7b"):
        gtflops.profile("facebook/opt-2.8b", batch_size=1, seq_len=8)


def test_without_a_network_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from gtflops.capture.architectures import hub_is_reachable

    def no_name(*_: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_name)
    assert not hub_is_reachable()
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert hub_is_reachable()


def test_a_preset_without_its_organisation() -> None:
    by_id = gtflops.profile("openai-community/gpt2", batch_size=1, seq_len=8)
    assert gtflops.profile("GPT2", batch_size=1, seq_len=8).full_flops == by_id.full_flops


def test_a_local_folder(tmp_path: Path) -> None:
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    ids = torch.ones(2, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    assert gtflops.profile(tmp_path, batch_size=2, seq_len=8).full_flops == gtflops.profile(model, batch).full_flops
    (tmp_path / "config.json").unlink()
    with pytest.raises(gtflops.InputError, match=r"no config\.json"):
        gtflops.profile(tmp_path, batch_size=2, seq_len=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "on sizes"),
        ({"model": "gpt2", "batch_size": 2}, "seq_len is missing: gpt2 takes tokens"),
        ({"model": "gpt2", "batch_size": 0, "seq_len": 8}, "batch_size is 0"),
        ({"model": "facebook/opt-125m", "batch_size": 1, "seq_len": 4096}, "beyond the 2048 positions"),
        ({"model": "google/vit-base-patch16-224", "batch_size": 1, "seq_len": 8}, "takes images"),
        ({"model": torch.nn.Linear(2, 2)}, "on a batch"),
        ({"model": 3}, "model is a int"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(gtflops.GtflopsError, match=message):
        gtflops.profile(**arguments)


class Frees(torch.autograd.Function):
    """Keeps something on its context until its backward has used it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.kept = x, weight
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.kept
        ctx.kept = None
        return gradient @ weight.T, x.T @ gradient


class AsksInForward(Frees):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.kept = x, weight
        return (x @ weight).sin() if ctx.needs_input_grad[1] else x @ weight


class Applies(torch.nn.Linear):
    function: Any = Frees

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x * self.bias, self.weight)


def test_a_function_whose_backward_frees_what_it_kept() -> None:
    model, x = Applies(4, 4), torch.ones(2, 4)
    profile = gtflops.profile(model, x, squared)
    assert profile.notes == ()
    for names in (["weight"], ["bias"], ["weight", "bias"]):
        train_only(model, names)
        assert predicted_operators(profile, names) == executed_operators(model, x, squared)


def test_a_function_that_asks_in_its_forward_is_noted() -> None:
    model = Applies(4, 4)
    model.function = AsksInForward
    (note,) = gtflops.profile(model, torch.ones(2, 4), squared).notes
    assert "AsksInForward reads ctx.needs_input_grad" in note


def test_a_reentrant_checkpoint_of_ones_own_is_refused() -> None:
    class Reentrant(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.module = module
            ctx.save_for_backward(x)
            with torch.no_grad():
                return module(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                ctx.module(x).backward(gradient)
            return None, x.grad

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Reentrant.apply(self.inner, self.first(x))

    with pytest.raises(gtflops.UnsupportedModelError, match=r"calls backward\(\) itself.*inner"):
        gtflops.profile(Outer(), torch.ones(2, 4), squared)


def test_kernels_that_follow_requires_grad_are_noted() -> None:
    class Biased(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)[None, None]
            return torch.nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.bias[:3, None].expand(3, 3))

    assert any(
        "mask that is trained" in note for note in gtflops.profile(Biased(4, 4), torch.ones(3, 4), squared).notes
    )

    class Vector(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).transpose(1, 2) @ self.bias[:3]

    assert any("(mv)" in note for note in gtflops.profile(Vector(4, 4), torch.ones(2, 3, 4), squared).notes)
    scripted = torch.jit.script(torch.nn.Linear(4, 4))
    assert any("TorchScript" in note for note in gtflops.profile(scripted, torch.ones(3, 4), squared).notes)


def test_work_in_hooks_is_noted() -> None:
    class Hooked(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            y.register_hook(lambda gradient: print(gradient.square().sum(), file=io.StringIO()))
            return y

    assert any("serve no gradient" in note for note in gtflops.profile(Hooked(4, 4), torch.ones(3, 4), squared).notes)
    model = torch.nn.Linear(4, 4)
    model.weight.register_post_accumulate_grad_hook(lambda tensor: None)
    assert any("first weight" in note for note in gtflops.profile(model, torch.ones(3, 4), squared).notes)


def test_a_branch_on_a_random_number() -> None:
    """Dropped layers: one draw is followed, and said to be one."""

    class Dropping(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sin() if torch.rand([]) < 0.5 else super().forward(x)

    model = Dropping(4, 4)
    state = torch.get_rng_state()
    profile = gtflops.profile(model, torch.ones(3, 4), squared)
    assert any("one draw" in note for note in profile.notes)
    assert torch.equal(state, torch.get_rng_state())


def test_anomaly_mode_is_no_data() -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert gtflops.profile(torch.nn.Linear(4, 4), torch.ones(3, 4), squared).full_flops
        assert torch.is_anomaly_enabled()


def test_attributes_of_parameters_are_there() -> None:
    class Tagged(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.weight.tag

    model = Tagged(4, 4)
    model.weight.tag = 2.0
    assert gtflops.profile(model, torch.ones(3, 4), squared).full_flops


@dataclass
class Pair:
    x: torch.Tensor
    counts: torch.Tensor


def test_tensors_in_objects_are_not_touched() -> None:
    class Writing(torch.nn.Linear):
        def forward(self, pair: Pair) -> torch.Tensor:
            pair.x.mul_(3.0)
            pair.counts.add_(1)
            return super().forward(pair.x)

    model, pair = Writing(4, 4), Pair(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))
    profile = gtflops.profile(model, (pair,), squared)
    assert pair.x.unique().tolist() == [1.0]
    assert pair.counts.tolist() == [0, 0]
    assert {name: tensor.shape for name, tensor in profile.graph.batch.items()} == {"0.x": (2, 4), "0.counts": (2,)}
    assert profile.verify(model, (pair,), squared, selections=0).exact
    assert pair.counts.tolist() == [0, 0]


def test_profiles_in_threads_do_not_disturb_each_other() -> None:
    case = ZOO["checkpointed-blocks"]()
    expected = gtflops.profile(case.model, case.batch, case.loss).step_flops("all")
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    stop = threading.Event()

    def train() -> None:
        other = ZOO["checkpointed-blocks"]()
        while not stop.is_set():
            squared(other.model(other.batch), None).backward()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with ThreadPoolExecutor(3) as threads:
            found = list(
                threads.map(lambda _: gtflops.profile(case.model, case.batch, case.loss).step_flops("all"), range(6))
            )
    finally:
        stop.set()
        trainer.join()
    assert found == [expected] * 6
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter


def test_lengths_are_limited_by_learned_positions_alone() -> None:
    assert gtflops.profile("meta-llama/Llama-3.2-1B", batch_size=1, seq_len=4096).full_flops
    with pytest.raises(gtflops.InputError, match="seq_len 514 is beyond the 512 positions"):
        gtflops.profile("FacebookAI/roberta-large", batch_size=1, seq_len=514)
    with pytest.raises(gtflops.InputError, match="decoder_len 2000 is beyond the 1024 positions"):
        gtflops.profile("facebook/bart-large", batch_size=1, seq_len=8, decoder_len=2000)


def test_another_class_than_the_configuration_names_is_said(tmp_path: Path) -> None:
    config = ZOO["bert-eager"]().model.config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    profile = gtflops.profile(tmp_path, batch_size=2, seq_len=8)
    assert "names BertForSequenceClassification; profiled is a BertForMaskedLM" in profile.notes[0]
    ZOO["whisper-eager"]().model.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    with pytest.raises(gtflops.UnsupportedModelError, match="no batch of tokens or images"):
        gtflops.profile(tmp_path, batch_size=2, seq_len=8)


def test_errors_of_the_loss_are_not_blamed_on_the_batch() -> None:
    model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(gtflops.InputError, match=r"the loss function failed: TypeError.*expected a function of"):
        gtflops.profile(model, x, lambda outputs: outputs.sum())
    with pytest.raises(gtflops.InputError, match="loss is 3, expected a function of"):
        gtflops.profile(model, x, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read"), ("[]", "holds a list"), ('{"model_type": "llama", "vocab_size": "many"}', "not valid")],
)
def test_configurations_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(gtflops.InputError, match=message):
        gtflops.profile(tmp_path, batch_size=1, seq_len=8)


def test_what_is_recomputed_belongs_to_its_module() -> None:
    case = ZOO["llama-sdpa-checkpointed"]()
    modules = {node.module for node in gtflops.profile(case.model, case.batch).graph.nodes if node.phase == "recompute"}
    assert "model.layers.1" in modules
    assert all(module.startswith("model.layers.") for module in modules)
