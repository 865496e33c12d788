"""Model + batch -> one joint forward and backward graph, executed once on fake tensors.

The step runs eagerly under a recording dispatch mode: what is recorded is what PyTorch really executes, in its
order, dead forward operators included (``make_fx`` removes those, and takes about four times as long). No tensor
of the user's model is touched: fake ones stand in for its parameters and buffers while it runs.
"""

import logging
import re
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from gtflops.capture.batches import Loss, batch_tensors, call_model, describe_batch, loss_of, with_tensors_replaced
from gtflops.capture.checkpoints import recorded_checkpoints
from gtflops.capture.custom_functions import asking_in_forward, record_whole
from gtflops.capture.fakes import fake, fake_parameter, without_garbage_collection
from gtflops.capture.notes import notes_of
from gtflops.capture.recording import Origin, Record, Recorder
from gtflops.capture.requires_grad import RequiresGradMode
from gtflops.capture.saved_tensors import saved_tensors, unread
from gtflops.capture.unchanged import unchanged
from gtflops.capture.uses import named_tensors, standing_in, uses_of_shared
from gtflops.capture.values import ValuesLostError
from gtflops.errors import InputError, UnsupportedModelError
from gtflops.graph import Graph, Node, Phase, Uses
from gtflops.operators import Call


@dataclass(frozen=True)
class Trace:
    """A captured step.

    ``gradients`` maps parameter names to positions in ``records``, ``always`` are the gradients of other tensors;
    ``notes`` say where the closure of a selection may not be what autograd executes.
    """

    model: str
    records: tuple[Record, ...]
    gradients: Mapping[str, int | None]
    always: tuple[int, ...]
    loss: int
    storage_bytes: tuple[int, ...]
    kept: tuple[tuple[int, tuple[int, ...]], ...]
    uses: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    notes: tuple[str, ...]

    def to_graph(self) -> Graph:
        """The step as plain data, without torch."""
        shared: dict[Call, Call] = {}
        nodes = tuple(
            Node(
                name=record.name,
                call=shared.setdefault(record.call, record.call),
                inputs=tuple(sorted(record.inputs)),
                phase=record.phase,
                module=record.origin.module,
                source=record.origin.source,
                storage=record.storage,
            )
            for record in self.records
        )
        return Graph(
            self.model, nodes, self.gradients, self.loss, self.always, self.storage_bytes, self.kept, self.uses
        )

    def to_fx(self) -> torch.fx.Graph:
        """The step as a torch.fx graph that can be run, a node for each record in the same order.

        Tensors that were there before are placeholders; ``meta["record"]`` of a node is its :class:`Record`.
        """
        graph = torch.fx.Graph()
        nodes: list[torch.fx.Node] = []
        for record in self.records:
            if record.target is None:
                node = graph.placeholder(f"{record.phase}_" + re.sub(r"\W", "_", record.name))
            else:
                args, kwargs = _with_nodes(record.args, nodes), _with_nodes(record.kwargs, nodes)
                node = graph.call_function(record.target, args, kwargs)
            node.meta["record"] = record
            nodes.append(node)
        return graph


def _with_nodes(value: Any, nodes: Sequence[torch.fx.Node]) -> Any:
    """Arguments of a record with torch.fx nodes in the place of records."""
    if isinstance(value, Record):
        return nodes[value.position]
    if isinstance(value, tuple):
        return tuple(_with_nodes(item, nodes) for item in value)
    if isinstance(value, dict):
        return {name: _with_nodes(item, nodes) for name, item in value.items()}
    return value


def trace(model: torch.nn.Module, batch: Any, loss: Loss | None = None, uses: Uses | None = None) -> Trace:
    """Record one training step of ``model`` on ``batch`` with every floating-point parameter trainable.

    Parameters may be real, fake or meta tensors; the batch is anything that :func:`call_model` takes. Of a real batch,
    integers and booleans keep their values; nothing else is computed. The model, the batch and the random states are
    left as they were (caches outside of the model that its code fills, such as an ``lru_cache`` of tensors, are not).
    Raises InputError for a model without parameters, a batch that the model refuses or a loss that cannot be trained
    on, and UnsupportedModelError where the model's control flow depends on data, with the line, or its backward cannot
    be priced.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if torch.nn.parameter.is_lazy(tensor)]
    if lazy:
        raise InputError(f"the tensor {lazy[0]!r} has no shape yet; expected a model that has seen one batch")
    if not any(tensor.is_floating_point() for tensor in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has no floating-point parameters, so there is nothing to train; "
            "expected a model with at least one"
        )
    with _ONE_AT_A_TIME:
        try:
            return _trace(model, batch, loss, uses, with_values=True)
        except ValuesLostError:
            return _trace(model, batch, loss, uses, with_values=False)


#: A trace swaps the parameters of its model, and how saved tensors are packed in this process.
_ONE_AT_A_TIME = threading.RLock()


def _trace(model: torch.nn.Module, batch: Any, loss: Loss | None, uses: Uses | None, *, with_values: bool) -> Trace:
    parameters, shared = named_tensors(model, uses), uses_of_shared(model, uses)
    buffers = dict(model.named_buffers())
    fake_mode = detect_fake_mode(list(parameters.values())) or FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(without_garbage_collection())
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it looks for NaNs, where there is no data
        own = {name: fake_parameter(fake_mode, tensor) for name, tensor in parameters.items()}
        own_buffers = {name: fake(fake_mode, tensor) for name, tensor in buffers.items()}
        without_data = all(tensor.is_meta for tensor in parameters.values())  # then the batch needs none either
        recorder.values.follow = with_values and fake_mode.allow_non_fake_inputs and not without_data

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            if recorder.values.follow and _has_values(tensor):
                copied = tensor.clone()
                recorder.values.add(copied)
                return copied
            return fake(fake_mode, tensor.to("meta") if without_data else tensor).requires_grad_(tensor.requires_grad)

        own_batch = with_tensors_replaced(batch, stand_in)
        for name, tensor in own.items():
            recorder.add_input(name, tensor, Phase.PARAMETER, Origin(name.rpartition(".")[0], ""))
        for name, tensor in own_buffers.items():
            recorder.add_input(name, tensor, Phase.BUFFER, Origin(name.rpartition(".")[0], ""))
        for name, tensor in batch_tensors(own_batch):
            recorder.add_input(name, tensor, Phase.BATCH, Origin("", ""))
        stack.enter_context(fake_mode)
        stack.enter_context(_without_log(logging.getLogger("torch._subclasses.fake_tensor")))
        stack.enter_context(standing_in(model, own, own_buffers, uses))
        stack.enter_context(recorder.modules_of(model))
        stack.enter_context(recorded_checkpoints(recorder))
        requires_grad = stack.enter_context(RequiresGradMode({id(tensor) for tensor in own.values()}))
        stack.enter_context(recorder)
        in_loss = False
        try:
            outputs = call_model(model, own_batch)
            in_loss = True
            value = loss_of(outputs, own_batch, loss)
            autograd_nodes = list(_autograd_nodes(value))
            _refuse_reentrant_checkpoints(autograd_nodes)
            uncertain = record_whole(autograd_nodes, recorder)
            trainable = {name: tensor for name, tensor in own.items() if tensor.requires_grad}
            others = _other_leaves(autograd_nodes, own.values()) | requires_grad.made
            saved = saved_tensors(autograd_nodes, recorder)
            recorder.phase = Phase.BACKWARD
            wanted = [*trainable.values(), *others.values()]
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
            recorder.finish()
            added_up = _added_up(shared, dict(zip(trainable, gradients, strict=False)), recorder)
            _refuse_inner_backward(own)
        except (InputError, UnsupportedModelError, ValuesLostError):
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedModelError(
                f"the control flow or a shape of {type(model).__name__} depends on the values of its data "
                f"({_reason(error)}), at {_user_line(error)}; expected a step whose operators depend on shapes alone: "
                f"replace the branch by torch.where or an argument{_experts_hint(model)}"
            ) from error
        except Exception as error:
            if recorder.phase is Phase.BACKWARD:
                raise UnsupportedModelError(
                    f"the backward pass of {type(model).__name__} failed: {type(error).__name__}: {error}"
                ) from error
            if in_loss:
                raise InputError(
                    f"the loss function failed: {type(error).__name__}: {error}, at {_user_line(error)}; expected a "
                    "function of (model outputs, batch) that gives a scalar tensor"
                ) from error
            raise InputError(
                f"{type(model).__name__} refused the batch {describe_batch(batch)}: {type(error).__name__}: {error}, "
                f"at {_user_line(error)}; expected a mapping of the forward's arguments, a tuple, or a tensor"
            ) from error
        positions = [None if gradient is None else recorder.record_of(gradient).position for gradient in gradients]
        return Trace(
            model=type(model).__name__,
            records=tuple(recorder.records),
            gradients=dict(zip(trainable, positions, strict=False)),
            always=tuple(position for position in positions[len(trainable) :] if position is not None),
            loss=recorder.record_of(value).position,
            storage_bytes=tuple(recorder.storage_bytes),
            kept=unread(saved, recorder),
            uses=added_up,
            notes=notes_of(
                model,
                parameters,
                uncertain=uncertain,
                asking=asking_in_forward(autograd_nodes),
                requires_grad=requires_grad,
                recorder=recorder,
                results=[
                    *(position for position in positions if position is not None),
                    *(position for _, sums in added_up for position in sums),
                ],
            ),
        )


def _added_up(
    uses: Iterable[tuple[str, ...]], gradients: Mapping[str, torch.Tensor | None], recorder: Recorder
) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """The names of each shared tensor's uses, and the records that add up their gradients, as autograd would."""
    found = []
    for names in uses:
        reached = [gradient for name in names if (gradient := gradients[name]) is not None]
        sums = accumulate(sorted(reached, key=lambda gradient: gradient.is_sparse), torch.add)  # to a dense one
        found.append((names, tuple(recorder.record_of(total).position for total in islice(sums, 1, None))))
    return tuple(found)


def _experts_hint(model: torch.nn.Module) -> str:
    """transformers' plain loop over experts asks which of them have tokens; its other implementations do not."""
    if getattr(getattr(model, "config", None), "_experts_implementation", None) != "eager":
        return ""
    return ', or for its experts model.set_experts_implementation("grouped_mm")'


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a batch is of the kind that models ask questions: masks, labels, token numbers."""
    return (
        not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or isinstance(tensor, FakeTensor))
        and tensor.layout is torch.strided
    )


def _autograd_nodes(value: torch.Tensor) -> Iterator[Any]:
    """The autograd graph of ``value``."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(source for source, _ in node.next_functions)


def _other_leaves(autograd_nodes: Iterable[Any], parameters: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The tensors that a backward pass gives gradients to although they are no parameters of the model."""
    known = {id(tensor) for tensor in parameters}
    leaves = (node.variable for node in autograd_nodes if hasattr(node, "variable"))
    return {id(leaf): leaf for leaf in leaves if id(leaf) not in known}


def _refuse_inner_backward(own: Mapping[str, torch.Tensor]) -> None:
    reached = [name for name, tensor in own.items() if tensor.grad is not None]
    if reached:
        raise UnsupportedModelError(
            f"the backward pass calls backward() itself, which gives a gradient to {len(reached)} tensors, first "
            f"{reached[0]!r}: a reentrant checkpoint of its own, as reversible layers have, cannot be recorded; "
            "expected a custom Function that returns its gradients"
        )


def _refuse_reentrant_checkpoints(autograd_nodes: Iterable[Any]) -> None:
    reentrant = torch.utils.checkpoint.CheckpointFunction
    if any(getattr(node, "_forward_cls", None) is reentrant for node in autograd_nodes):
        raise UnsupportedModelError(
            "the model uses reentrant activation checkpointing, whose backward pass is no graph to be recorded; "
            "expected the non-reentrant form: torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
            'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )


def _reason(error: Exception) -> str:
    operator_name = getattr(error, "func", None) or (error.args[0] if error.args else "")
    return f"{operator_name}" or type(error).__name__


_TORCH = Path(torch.__file__).parent
_HERE = Path(__file__).parent


def _user_line(error: BaseException) -> str:
    """Where in the model's own code an error arose, ``file:line: code``; in torch's where the model has none."""
    frames = list(reversed(traceback.extract_tb(error.__traceback__)))
    modules = _TORCH / "nn" / "modules"
    for frame in frames:
        if not Path(frame.filename).is_relative_to(_TORCH) and not Path(frame.filename).is_relative_to(_HERE):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
        if Path(frame.filename).parent == modules and Path(frame.filename).name != "module.py":
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return f"{frames[0].filename}:{frames[0].lineno}: {frames[0].line}"


@contextmanager
def _without_log(logger: logging.Logger) -> Iterator[None]:
    """What fails on fake tensors is raised to the user with its reason; the log would print it a second time."""
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
