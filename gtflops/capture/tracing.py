"""Model + batch -> one joint forward and backward torch.fx graph, executed once on fake tensors.

The step runs eagerly under a recording dispatch mode: what is recorded is what PyTorch really executes, in its
order, dead forward operators included (``make_fx`` removes those, and takes about four times as long). No tensor
of the user's model is touched: fake ones stand in for its parameters and buffers while it runs.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.utils import stateless
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gtflops.capture.dispatch import tensor_type
from gtflops.capture.recording import Recorder
from gtflops.capture.unchanged import unchanged
from gtflops.errors import InputError, UnsupportedModelError
from gtflops.graph import Graph, Node, Phase
from gtflops.operators import Call, TensorType

#: A function of (model outputs, batch) that gives a scalar tensor.
Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Trace:
    """A captured step as torch.fx holds it.

    Every node's ``meta`` has ``call`` (:class:`gtflops.operators.Call`), ``phase``, ``module`` and ``after``: the
    nodes whose in-place writes it depends on besides its arguments. ``gradients`` maps parameter names to nodes;
    ``notes`` say where the closure of a selection may not be what autograd executes.
    """

    model: str
    graph: torch.fx.Graph
    gradients: Mapping[str, torch.fx.Node | None]
    loss: torch.fx.Node
    notes: tuple[str, ...]

    def to_graph(self) -> Graph:
        """The same as plain data, without torch."""
        index = {node: position for position, node in enumerate(self.graph.nodes)}
        shared: dict[Call, Call] = {}
        nodes = tuple(
            Node(
                name=node.meta.get("name", node.name),
                call=shared.setdefault(node.meta["call"], node.meta["call"]),
                inputs=tuple(sorted({index[source] for source in (*node.all_input_nodes, *node.meta["after"])})),
                phase=node.meta["phase"],
                module=node.meta["module"],
            )
            for node in self.graph.nodes
        )
        gradients = {name: None if node is None else index[node] for name, node in self.gradients.items()}
        return Graph(self.model, nodes, gradients, index[self.loss])


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, ``model(batch)`` otherwise."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def loss_of(outputs: Any, batch: Any, loss: Loss | None, *, trained: bool = True) -> torch.Tensor:
    """The scalar loss of a step: ``loss(outputs, batch)``, or ``outputs.loss``. InputError if it is none, or if it
    needs no gradient although something is ``trained``."""
    value: Any
    if loss is not None:
        value = loss(outputs, batch)
        source = "the loss function returned"
    else:
        value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        source = "the model's outputs have as .loss"
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{source} {value!r}, expected a scalar tensor; put labels into the batch, "
            "or give loss=lambda outputs, batch: ..."
        )
    if value.numel() != 1:
        raise InputError(
            f"{source} a tensor of shape {tuple(value.shape)}, expected a scalar; reduce it, for example by .mean()"
        )
    if trained and not value.requires_grad:
        raise InputError(f"{source} a tensor that needs no gradient, expected one that depends on the parameters")
    return value


def trace(model: torch.nn.Module, batch: Any, loss: Loss | None = None) -> Trace:
    """Record one training step of ``model`` on ``batch`` with every floating-point parameter trainable.

    Parameters may be real, fake or meta tensors; the batch is anything that :func:`call_model` takes. Nothing is
    computed and the model, the batch and the random states are left as they were (caches outside of the model that
    its code fills, such as an ``lru_cache`` of tensors, are not). Raises InputError for a model without parameters, a
    batch that the model refuses or a loss that cannot be trained on, and UnsupportedModelError where the model's
    control flow depends on data, with the line, or its backward cannot be priced.
    """
    lazy = [name for name, tensor in model.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
    if lazy:
        raise InputError(f"the tensor {lazy[0]!r} has no shape yet; expected a model that has seen one batch")
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    if not any(tensor.is_floating_point() for tensor in parameters.values()):
        raise InputError(
            f"{type(model).__name__} has no floating-point parameters, so there is nothing to train; "
            "expected a model with at least one"
        )
    for name, tensor in _batch_tensors(batch):
        if tensor.requires_grad:
            raise InputError(
                f"the batch's tensor {name!r} requires a gradient, which a step would compute besides those of the "
                "parameters; expected a batch without: detach it"
            )
    fake_mode = detect_fake_mode(list(parameters.values())) or FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        fake = {name: _fake_parameter(fake_mode, tensor) for name, tensor in parameters.items()}
        fake_buffers = {name: _fake(fake_mode, tensor) for name, tensor in buffers.items()}
        without_data = all(tensor.is_meta for tensor in parameters.values())  # then the batch needs none either
        fake_batch = pytree.tree_map_only(
            torch.Tensor,
            lambda tensor: _fake(fake_mode, tensor.to("meta") if without_data else tensor),
            _plain(batch),
        )
        recorder = Recorder()
        for name, tensor in fake.items():
            recorder.add_input(name, tensor, Phase.PARAMETER, name.rpartition(".")[0])
        for name, tensor in fake_buffers.items():
            recorder.add_input(name, tensor, Phase.BUFFER, name.rpartition(".")[0])
        for name, tensor in _batch_tensors(fake_batch):
            recorder.add_input(name, tensor, Phase.BATCH, "")
        stack.enter_context(fake_mode)
        stack.enter_context(_without_log(logging.getLogger("torch._subclasses.fake_tensor")))
        stack.enter_context(stateless._reparametrize_module(model, {**fake, **fake_buffers}, tie_weights=True))
        stack.enter_context(recorder.modules_of(model))
        known = {id(tensor) for tensor in fake.values()}
        stack.enter_context(_NoInputGradients(known))
        stack.enter_context(recorder)
        try:
            value = loss_of(call_model(model, fake_batch), fake_batch, loss)
            if any(id(leaf) not in known for leaf in _leaves(value)):
                raise _input_gradient()
            recorder.phase = Phase.BACKWARD
            trainable = {name: tensor for name, tensor in fake.items() if tensor.requires_grad}
            gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
        except (InputError, UnsupportedModelError):
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedModelError(
                f"the control flow or a shape of {type(model).__name__} depends on the values of its data "
                f"({_reason(error)}), at {_user_line(error)}; expected a step whose operators depend on shapes alone: "
                "replace the branch by torch.where or an argument"
            ) from error
        except Exception as error:
            if recorder.phase is Phase.BACKWARD:
                raise UnsupportedModelError(
                    f"the backward pass of {type(model).__name__} failed: {type(error).__name__}: {error}"
                ) from error
            raise InputError(
                f"{type(model).__name__} refused the batch {_describe(batch)}: {type(error).__name__}: {error}, "
                f"at {_user_line(error)}; expected a mapping of the forward's arguments, a tuple, or a tensor"
            ) from error
        return Trace(
            model=type(model).__name__,
            graph=recorder.graph,
            gradients={
                name: None if gradient is None else recorder.node_of(gradient)
                for name, gradient in zip(trainable, gradients, strict=True)
            },
            loss=recorder.node_of(value),
            notes=_notes(model, parameters, fake_batch, recorder),
        )


def _notes(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], batch: Any, recorder: Recorder
) -> tuple[str, ...]:
    """Where the closure of a selection may not be what autograd executes."""
    notes = [
        f"the backward of the custom autograd.Function {name} is taken to compute only the gradients that are asked "
        "for; if it computes all of its inputs', a step that trains some of them costs more"
        for name in sorted(recorder.custom_functions)
    ]
    hooked = [name for name, tensor in parameters.items() if tensor._backward_hooks]
    if hooked:
        notes.append(f"hooks on gradients are not run in a trace, nor priced: {len(hooked)} tensors, first {hooked[0]}")
    complex_tensors = [name for name, tensor in parameters.items() if tensor.is_complex()]
    if complex_tensors:
        notes.append(f"complex tensors are taken as frozen: {len(complex_tensors)}, first {complex_tensors[0]}")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention == "sdpa" and isinstance(batch, Mapping) and "attention_mask" in batch:
        notes.append(
            "the attention mask is taken to hold padding: where it holds none, transformers leaves it out under sdpa, "
            "which changes the operators around attention (not its matrix products)"
        )
    return tuple(notes)


class _NoInputGradients(TorchFunctionMode):
    """Refuses code that makes an activation require a gradient: its backward would run for every selection."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self._parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.requires_grad_:
            asked = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
        else:
            asked = func is torch.Tensor.requires_grad.__set__ and args[1]  # type: ignore[attr-defined]
        if asked and id(args[0]) not in self._parameters:
            raise _input_gradient()
        return func(*args, **kwargs)


def _input_gradient() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the step uses a tensor that requires a gradient and is no parameter of the model, or one that is kept outside "
        "of its modules, or it makes an activation require one (enable_input_require_grads does): the backward pass "
        "runs down to it whatever is trained, which gtflops does not price yet; make it a parameter of the model, or "
        "profile without, for example after model.disable_input_require_grads()"
    )


def _leaves(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a backward pass from ``value`` would give gradients to."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(source for source, _ in node.next_functions)


def _fake(fake_mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without data in the place of ``tensor``, on the same device."""
    if isinstance(tensor, FakeTensor):
        with fake_mode:
            return tensor.detach()
    if tensor.is_inference():  # autograd takes no tensor that was made under inference mode
        with fake_mode:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fake_mode.from_tensor(tensor, static_shapes=True).detach()


def _fake_parameter(fake_mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(_fake(fake_mode, tensor), requires_grad=tensor.is_floating_point())


def _plain(batch: Any) -> Any:
    """Mappings of any class (such as transformers' BatchEncoding) as dicts, which pytree knows."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _batch_tensors(batch: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch by key or position."""
    for path, leaf in pytree.tree_leaves_with_path(_plain(batch)):
        if isinstance(leaf, torch.Tensor):
            yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "0", leaf


def batch_types(batch: Any) -> dict[str, TensorType]:
    """Shapes and dtypes of the tensors of a batch, named as in :attr:`gtflops.graph.Graph.batch`."""
    return {name: tensor_type(tensor) for name, tensor in _batch_tensors(batch)}


def _describe(batch: Any) -> str:
    """Shapes and dtypes of a batch, for messages."""
    return str(
        pytree.tree_map_only(
            torch.Tensor,
            lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
            _plain(batch),
        )
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
def _no_garbage_collection() -> Iterator[None]:
    """A trace keeps all that it makes until its end: collecting on the way finds nothing, and takes a quarter of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _without_log(logger: logging.Logger) -> Iterator[None]:
    """What fails on fake tensors is raised to the user with its reason; the log would print it a second time."""
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
