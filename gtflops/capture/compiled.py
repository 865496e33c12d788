"""The graphs that torch.compile would run: dynamo and AOTAutograd with a back-end that prices instead of compiling.

Parameters, buffers and batch are fake tensors, so nothing is computed. What inductor would be given, before it
fuses, is what is priced: its decompositions, and the forward and backward graphs of its min-cut partitioner.
"""

import inspect
import operator
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.fx
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import convert_frame, eval_frame, guards, pgo
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import CleanupManager, counters, graph_break_reasons
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import stateless

from gtflops.capture.batches import Loss, call_model, loss_of, with_tensors_replaced
from gtflops.capture.dispatch import OperatorMode, describe_call
from gtflops.capture.fakes import fake, without_garbage_collection
from gtflops.capture.unchanged import unchanged
from gtflops.compiled import CompiledOperator, CompiledStep, Part
from gtflops.errors import GtflopsError, UnsupportedModelError
from gtflops.operators import Flops, price_executed

#: In a node's ``meta``: its place in the joint graph, and in a backward graph whether the forward graph runs it too.
_JOINT, _AGAIN = "gtflops_joint", "gtflops_again"

#: Higher-order operators that run the operator at this argument, and keep a random state around it.
_WRAPPED = {"run_and_save_rng_state": 0, "run_with_rng_state": 1, "graphsafe_run_with_rng_state": 0}


def compiled_step(model: torch.nn.Module, batch: Any, loss: Loss | None = None) -> CompiledStep:
    """What ``torch.compile`` would run of a step of ``model`` in which its tensors with ``requires_grad`` are trained.

    Takes what :func:`gtflops.capture.trace` takes, and leaves the model, the batch, the random states and what else
    was compiled in this process as they were. A model on the meta device is captured as if it were on the CPU, with
    unfused attention. Raises UnsupportedModelError where dynamo or AOTAutograd cannot take the step.
    """
    parameters = dict(model.named_parameters())
    trainable = tuple(
        name for name, tensor in parameters.items() if tensor.requires_grad and tensor.is_floating_point()
    )
    fake_mode = detect_fake_mode(list(parameters.values())) or FakeTensorMode(allow_non_fake_inputs=True)
    on_meta = all(tensor.is_meta for tensor in parameters.values())

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        return _on_cpu(fake_mode, tensor) if on_meta else fake(fake_mode, tensor)

    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(without_garbage_collection())
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fake_mode)
        fakes = {
            name: torch.nn.Parameter(stand_in(tensor), requires_grad=name in trainable)
            for name, tensor in parameters.items()
        }
        buffers = {name: stand_in(tensor) for name, tensor in model.named_buffers()}
        fake_batch = with_tensors_replaced(batch, stand_in)
        if on_meta:
            # Dynamo does not follow the loss through meta tensors to its gradients (torch 2.13). As on meta, attention
            # is not fused, so that the eager prediction prices the same.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            _attributes_from_meta(model, stand_in)
        stack.enter_context(stateless._reparametrize_module(model, {**fakes, **buffers}, tie_weights=True))
        stack.enter_context(_dynamo_left_as_it_was(tally))
        stack.enter_context(tally)
        try:
            value = _compiled(tally)(model, fake_batch, loss)
            tally.part = "backward"
            if value.requires_grad:
                torch.autograd.grad(value, [fakes[name] for name in trainable], allow_unused=True)
        except GtflopsError:
            raise
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, GtflopsError):
                raise error.inner_exception from None
            raise _refused(model, error) from error
        except Exception as error:
            raise _refused(model, error) from error
    return tally.step(trainable)


def _refused(model: torch.nn.Module, error: Exception) -> UnsupportedModelError:
    said = " ".join(str(error).partition("Developer debug context")[0].split())  # the rest is for torch's developers
    return UnsupportedModelError(
        f"torch.compile cannot take a step of {type(model).__name__}: {type(error).__name__}: {said}; profile it with "
        "graph='eager', or keep what it names out of the compiled part with torch.compiler.disable"
    )


class _Tally(OperatorMode):
    """Adds up what runs: compiled graphs as they are called, and, as a dispatch mode, operators outside of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part: Part = "forward"
        self.graph_breaks: list[str] = []
        self._graphs = 0
        self._in_graph = False
        self._rows: dict[tuple[Part, str], tuple[int, Flops | None]] = {}
        self._outside = Flops()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles nothing under a mode that wants to see the operators one by one."""
        return True

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):  # inside of a graph, which was priced as a whole
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._in_graph:
            return
        again = torch._C._current_autograd_node() is not None and torch.is_grad_enabled()  # inside a checkpoint
        flops = self._add("recompute" if again else self.part, *_priced(func, args, kwargs, result))
        self._outside = _plus(self._outside, flops)

    def graph(self, module: torch.fx.GraphModule, part: Part) -> Callable[..., Any]:
        """``module`` as a back-end returns it: each call adds its operators."""
        priced = list(_operators(module, part))

        def run(*args: Any) -> Any:
            again = part == "forward" and self.part == "backward"
            self._graphs += part == "forward" and not again
            for part_of_step, name, flops in priced:
                self._add("recompute" if again else part_of_step, name, flops)
            before, self._in_graph = self._in_graph, True
            try:
                return module(*args)
            finally:
                self._in_graph = before

        return make_boxed_func(run)

    def step(self, trainable: tuple[str, ...]) -> CompiledStep:
        """Everything so far."""
        operators = tuple(
            CompiledOperator(part, name, count, flops) for (part, name), (count, flops) in self._rows.items()
        )
        breaks = tuple(dict.fromkeys(self.graph_breaks))
        return CompiledStep(trainable, operators, self._outside, self._graphs, breaks)

    def _add(self, part: Part, name: str, flops: Flops | None) -> Flops:
        count, before = self._rows.get((part, name), (0, Flops()))
        self._rows[part, name] = (count + 1, None if flops is None or before is None else _plus(before, flops))
        return flops or Flops()


def _plus(first: Flops, second: Flops) -> Flops:
    return Flops(first.matmul + second.matmul, first.other + second.other)


def _priced(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[str, Flops | None]:
    """The name of an operator that runs, and its price."""
    call = describe_call(func, args, kwargs, result)
    cost = price_executed(call)
    if cost is not None and not all(type(column) is int for column in cost):
        raise UnsupportedModelError(
            f"{call.op} works on a shape that depends on the values of its data; expected a step whose operators "
            "depend on shapes alone"
        )
    return call.op, cost


def _operators(module: torch.fx.GraphModule, part: Part) -> Iterator[tuple[Part, str, Flops | None]]:
    """The operators of one of AOTAutograd's graphs with their prices."""

    def value(node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return node.meta.get("val")  # random states have none
        if node.op != "get_attr" or "val" in node.meta:
            return node.meta["val"]
        return operator.attrgetter(str(node.target))(module)

    values = [found for node in module.graph.nodes if isinstance(found := node.meta.get("val"), FakeTensor)]
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, (HigherOrderOperator, OpOverload)):
            continue  # the rest is arithmetic on sizes, and getitem
        func, again = node.target, node.meta.get(_AGAIN, False)
        args = torch.fx.node.map_arg(node.args, value)
        kwargs = dict(torch.fx.node.map_arg(node.kwargs, value))
        result = node.meta.get("val")
        if isinstance(func, HigherOrderOperator):
            position = _WRAPPED.get(func.name())
            if position is None:
                yield ("recompute" if again else part), f"higher_order.{func.name()}", None
                continue
            again = position == 1 or (part == "backward" and "rng_state" in kwargs)
            func, args = args[position], args[position + 1 :]
            kwargs.pop("rng_state", None)
            # Where the partitioner puts such an operator, it gives it no value.
            with values[0].fake_mode:
                result = func(*args, **kwargs)
            node.meta.setdefault("val", result)
        yield ("recompute" if again else part), *_priced(func, args, kwargs, result)


def _partition(
    joint: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Inductor's partitioner; the nodes that it gives to both graphs are marked in the backward graph.

    Both graphs are copies of nodes of the joint graph, with their ``meta``.
    """
    for place, node in enumerate(joint.graph.nodes):
        node.meta[_JOINT] = place
    forward, backward = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **settings)
    in_forward = {node.meta.get(_JOINT) for node in forward.graph.nodes if node.op == "call_function"}
    for node in backward.graph.nodes:
        node.meta[_AGAIN] = node.meta.get(_JOINT) is not None and node.meta[_JOINT] in in_forward
    return forward, backward


def _compiled(tally: _Tally) -> Callable[..., torch.Tensor]:
    """A step as one function, forward and loss, compiled with the pricing back-end."""

    def step(model: torch.nn.Module, batch: Any, loss: Loss | None) -> torch.Tensor:
        return loss_of(call_model(model, batch), batch, loss, trained=False)

    backend = aot_autograd(
        fw_compiler=lambda module, inputs: tally.graph(module, "forward"),
        bw_compiler=lambda module, inputs: tally.graph(module, "backward"),
        decompositions=select_decomp_table(),
        partition_fn=_partition,
        keep_inference_input_mutations=True,
    )
    settings: dict[str, Any] = {"backend": backend, "dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
        settings["isolate_recompiles"] = True
    # What dynamo compiles hangs on the code object, and its helpers in the globals: these two go with the function.
    fresh = types.FunctionType(step.__code__.replace(), {**globals()}, step.__name__, closure=step.__closure__)
    return torch.compile(fresh, **settings)


@contextmanager
def _dynamo_left_as_it_was(tally: _Tally) -> Iterator[None]:
    """Compiles afresh inside, whatever the user set or compiled before, and takes back what it leaves in dynamo.

    Where a graph breaks, functions of the model itself are compiled, and dynamo keeps that in their code objects.
    """
    config = torch._dynamo.config
    codes = convert_frame.input_codes
    before = set(codes.seen_ids)
    installed = CleanupManager.instance
    before_installed = set(installed.values)
    backends = set(eval_frame.cached_backends)
    counted = {name: counter.copy() for name, counter in counters.items()}
    num_reasons = len(graph_break_reasons)
    try:
        with (
            torch.compiler.set_stance("default"),
            config.patch(
                disable=False,
                suppress_errors=False,
                error_on_recompile=False,
                recompile_limit=1 << 30,
                accumulated_recompile_limit=1 << 30,
                automatic_dynamic_local_pgo=False,
                automatic_dynamic_remote_pgo=False,
            ),
            # The shapes seen for each function, from which dynamo takes which sizes change.
            mock.patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
            mock.patch.object(pgo, "_INIT_CODE_STATE", None),
        ):
            yield
    finally:
        tally.graph_breaks += [_describe(reason) for reason in graph_break_reasons[num_reasons:]]
        del graph_break_reasons[num_reasons:]
        ours = {id(backend) for key, backend in eval_frame.cached_backends.items() if key not in backends}
        for code in [reference() for reference in codes.seen]:
            if code is None:
                continue
            if id(code) not in before:
                reset_code(code)
                continue
            for entry in eval_frame._debug_get_cache_entry_list(code):
                if id(entry.backend) in ours and (kept := entry.guard_manager.extra_state) is not None:
                    kept.invalidate(entry, guards.DeletedGuardManagerWrapper("made by gtflops"))
        codes.seen[:] = [reference for reference in codes.seen if id(reference()) in before]
        codes.seen_ids &= before
        for code_id in set(installed.values) - before_installed:
            installed._remove_id(code_id)  # deletes the names that the compiled code has in the globals of its module
        for key in set(eval_frame.cached_backends) - backends:
            del eval_frame.cached_backends[key]
        counters.clear()
        counters.update(counted)


def _describe(reason: GraphCompileReason) -> str:
    """Why a graph broke, in one line."""
    where = f" at {reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return reason.reason.strip().partition("\n")[0] + where


def _on_cpu(fake_mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the CPU in the place of ``tensor``."""
    with fake_mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")


def _attributes_from_meta(model: torch.nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Tensors that modules keep as plain attributes, to where the parameters are; the caller puts them back."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, name, fake(value))
