"""Writing down what runs, as one torch.fx graph."""

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from gtflops.capture.dispatch import OperatorMode, describe_call, outputs_of, tensor_type
from gtflops.errors import UnsupportedModelError
from gtflops.graph import GETITEM, Phase
from gtflops.operators import Call


class Recorder(OperatorMode):
    """Builds the torch.fx graph as operators run.

    Tensors are told apart by identity, and all are kept until the end so that no identity is used twice. A read
    depends on the node that made the tensor and on the last write into its storage, through whichever view: writes
    into views of one storage are so ordered after each other, as autograd itself orders them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = torch.fx.Graph()
        self.phase = Phase.FORWARD
        self.custom_functions: set[str] = set()
        self._nodes: dict[int, torch.fx.Node] = {}
        self._kept: list[Any] = []
        self._last_write: dict[int, torch.fx.Node] = {}
        self._module_stack: list[str] = []
        self._module_of_sequence: dict[int, str] = {}

    def add_input(self, name: str, tensor: torch.Tensor, phase: Phase, module: str) -> torch.fx.Node:
        """A tensor that was there before the step."""
        node = self.graph.placeholder(f"{phase}_" + re.sub(r"\W", "_", name))
        call = Call(str(phase), (), (), (tensor_type(tensor),))
        node.meta.update(name=name, call=call, phase=phase, module=module, after=())
        self._keep(tensor, node)
        return node

    def node_of(self, tensor: torch.Tensor) -> torch.fx.Node:
        """The node that made ``tensor``; a tensor never seen before is a constant of the model's code."""
        node = self._nodes.get(id(tensor))
        return self.add_input("constant", tensor, Phase.CONSTANT, self._module()) if node is None else node

    def observe(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if result is None and not func._schema.is_mutable:
            return
        if torch._C._current_autograd_node() is not None and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "the backward pass runs operators with gradients enabled (activation checkpointing, or a gradient of a "
                "gradient), which gtflops does not price yet; profile the model without, for example after "
                "model.gradient_checkpointing_disable()"
            )
        read: list[torch.Tensor] = []
        node_args = self._nodes_for(args, read)
        node_kwargs = {name: self._nodes_for(value, read) for name, value in kwargs.items()}
        writes = [self._last_write.get(_storage(tensor)) for tensor in read]
        node = self.graph.call_function(func, node_args, node_kwargs)
        module = self._module()
        node.meta.update(
            call=describe_call(func, args, kwargs, result),
            phase=self.phase,
            module=module,
            after=tuple(dict.fromkeys(write for write in writes if write is not None)),
        )
        for written in _written(func, args, kwargs):
            self._last_write[_storage(written)] = node
        if isinstance(result, torch.Tensor):
            self._keep(result, node)
            return
        for position, output in enumerate(outputs_of(result)):
            if isinstance(output, torch.Tensor):
                part = self.graph.call_function(operator.getitem, (node, position))
                call = Call(GETITEM, (position,), (), (tensor_type(output),))
                part.meta.update(call=call, phase=self.phase, module=module, after=())
                self._keep(output, part)

    def _nodes_for(self, value: Any, read: list[torch.Tensor]) -> Any:
        """An operator's argument with nodes for tensors; the tensors are added to ``read``."""
        if isinstance(value, torch.Tensor):
            read.append(value)
            return self.node_of(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._nodes_for(item, read) for item in value)
        return value

    def _keep(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _module(self) -> str:
        """The module that runs now. A backward operator belongs to the module whose forward made its autograd node,
        found by the sequence number which autograd gives to each."""
        autograd_node = torch._C._current_autograd_node()
        if autograd_node is not None:
            if isinstance(autograd_node, torch.autograd.function.BackwardCFunction):
                self.custom_functions.add(autograd_node.name().removesuffix("Backward"))
            return self._module_of_sequence.get(autograd_node._sequence_nr(), "")
        module = self._module_stack[-1] if self._module_stack else ""
        self._module_of_sequence.setdefault(torch.autograd._get_sequence_nr() - 1, module)
        return module

    @contextmanager
    def modules_of(self, model: torch.nn.Module) -> Iterator[None]:
        """Keeps the stack of the modules of ``model`` that are running."""
        path = {id(module): name for name, module in model.named_modules()}

        def enter(module: torch.nn.Module, args: Any) -> None:
            if id(module) in path:
                self._module_stack.append(path[id(module)])

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if id(module) in path:
                self._module_stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that ``func`` writes into, as its schema declares."""
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
