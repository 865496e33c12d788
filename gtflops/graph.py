"""The tensor-level graph of one training step: what capture hands on. Immutable, serialisable, no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gtflops.operators import Argument, Call, TensorType

if TYPE_CHECKING:
    import networkx


#: ``"separate"``: each use of a tensor that several modules share, as a tied embedding, is a tensor of its own.
Uses: TypeAlias = Literal["separate"]


class Phase(StrEnum):
    """When a node comes to be."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    BATCH = "batch"
    CONSTANT = "constant"
    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"


#: The op of a node that picks one output of an operator with several; priced where the price is by output.
GETITEM = "getitem"


@dataclass(frozen=True, slots=True)
class Node:
    """One operator executed (or one tensor that was there before), in execution order.

    ``inputs`` are the indices of the nodes it depends on, by data, because they wrote into what it reads, or because
    autograd runs them together. ``module`` is the path of the module that called it and ``source`` the line of code,
    ``file:line``; a backward node bears its forward operator's. ``storage`` is the index in
    :attr:`Graph.storage_bytes` of the memory that its output lies in, ``None`` for an operator with several outputs.
    """

    name: str
    call: Call
    inputs: tuple[int, ...]
    phase: Phase
    module: str
    source: str
    storage: int | None


@dataclass(frozen=True, slots=True)
class Graph:
    """A joint forward and backward graph.

    ``gradients`` maps each parameter tensor that can be trained to the node that holds its gradient, or to ``None``
    where the loss does not depend on it. ``always`` are the nodes that hold gradients which a step computes whatever is
    trained: of tensors that are no parameters. Every node's inputs stand before it. Views share a storage;
    ``storage_bytes`` are the sizes of all. ``kept`` are pieces of memory, by index, that autograd keeps although no
    operator reads them (of some tensors only the shape is used), with the nodes that they are kept for. ``uses`` are,
    where each use of a tensor that several modules share is one of ``gradients``, for each such tensor the names of its
    uses, and the nodes that add up their gradients: of ``n`` trained uses, the first ``n - 1`` nodes run.
    """

    model: str
    nodes: tuple[Node, ...]
    gradients: Mapping[str, int | None]
    loss: int
    always: tuple[int, ...]
    storage_bytes: tuple[int, ...]
    kept: tuple[tuple[int, tuple[int, ...]], ...]
    uses: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = ()

    def __repr__(self) -> str:
        return f"Graph({self.model}: {len(self.nodes)} nodes, {len(self.gradients)} tensors)"

    @property
    def batch(self) -> dict[str, TensorType]:
        """Shapes and dtypes of the batch that was traced, by its key or position."""
        return {node.name: node.call.output for node in self.nodes if node.phase is Phase.BATCH}

    def to_networkx(self) -> "networkx.DiGraph[int]":
        """A DiGraph: nodes by index with their ``name op phase module source outputs``, edges with their ``tensor``.

        ``outputs`` and ``tensor`` are :class:`gtflops.operators.TensorType`, shape and dtype. The edge of an operator
        with several outputs, which are nodes of their own, carries ``None``.
        """
        import networkx

        digraph: networkx.DiGraph[int] = networkx.DiGraph(model=self.model)
        for index, node in enumerate(self.nodes):
            digraph.add_node(
                index,
                name=node.name,
                op=node.call.op,
                phase=str(node.phase),
                module=node.module,
                source=node.source,
                outputs=node.call.outputs,
            )
            for source in node.inputs:
                outputs = self.nodes[source].call.outputs
                digraph.add_edge(source, index, tensor=outputs[0] if len(outputs) == 1 else None)
        return digraph

    def to_json(self) -> dict[str, Any]:
        """Plain data; equal calls are written once."""
        calls: dict[Call, int] = {}
        modules: dict[str, int] = {}
        sources: dict[str, int] = {}
        nodes = [
            [
                node.name,
                calls.setdefault(node.call, len(calls)),
                list(node.inputs),
                str(node.phase),
                modules.setdefault(node.module, len(modules)),
                sources.setdefault(node.source, len(sources)),
                node.storage,
            ]
            for node in self.nodes
        ]
        return {
            "model": self.model,
            "modules": list(modules),
            "sources": list(sources),
            "calls": [_call_to_json(call) for call in calls],
            "nodes": nodes,
            "gradients": dict(self.gradients),
            "loss": self.loss,
            "always": list(self.always),
            "storage_bytes": list(self.storage_bytes),
            "kept": [[storage, list(positions)] for storage, positions in self.kept],
            "uses": [[list(names), list(sums)] for names, sums in self.uses],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Graph":
        """The inverse of :meth:`to_json`. May raise any error of Python's on data that it did not write."""
        calls = [_call_from_json(call) for call in data["calls"]]
        modules = [str(module) for module in data["modules"]]
        sources = [str(source) for source in data["sources"]]
        storage_bytes = tuple(int(size) for size in data["storage_bytes"])
        nodes: list[Node] = []
        for name, call, inputs, phase, module, source, storage in data["nodes"]:
            if not 0 <= call < len(calls):
                raise ValueError(f"node {name!r} has call {call!r}, which there is none of")
            if any(not 0 <= before < len(nodes) for before in inputs):
                raise ValueError(f"node {name!r} has an input that does not stand before it")
            if storage is not None and not 0 <= storage < len(storage_bytes):
                raise ValueError(f"node {name!r} lies in storage {storage}, which there is none of")
            nodes.append(
                Node(str(name), calls[call], tuple(inputs), Phase(phase), modules[module], sources[source], storage)
            )
        gradients: dict[str, int | None] = dict(data["gradients"])
        loss, always = data["loss"], tuple(data["always"])
        parameters = {node.name for node in nodes if node.phase is Phase.PARAMETER}
        for name in gradients:
            if name not in parameters:
                raise ValueError(f"there is a gradient of {name!r}, and no such tensor")
        for index in (*(index for index in gradients.values() if index is not None), *always, loss):
            if type(index) is not int or not 0 <= index < len(nodes):
                raise ValueError(f"there is no node {index!r}")
        kept = tuple((storage, tuple(positions)) for storage, positions in data["kept"])
        for storage, positions in kept:
            if not 0 <= storage < len(storage_bytes) or any(not 0 <= index < len(nodes) for index in positions):
                raise ValueError(f"storage {storage!r} is kept for {positions!r}, which are not all there")
        uses = tuple((tuple(names), tuple(sums)) for names, sums in data.get("uses", ()))
        for names, sums in uses:
            reached = [name for name in names if gradients[name] is not None]
            if len(sums) != max(0, len(reached) - 1) or any(not 0 <= index < len(nodes) for index in sums):
                raise ValueError(f"the gradients of {reached!r} are added up by the nodes {sums!r}")
        return cls(str(data["model"]), tuple(nodes), gradients, loss, always, storage_bytes, kept, uses)


def _call_to_json(call: Call) -> list[Any]:
    return [
        call.op,
        [_argument_to_json(argument) for argument in call.args],
        {name: _argument_to_json(value) for name, value in call.kwargs},
        [_argument_to_json(output) for output in call.outputs],
    ]


def _call_from_json(data: Sequence[Any]) -> Call:
    op, args, kwargs, outputs = data
    types = tuple(_argument_from_json(output) for output in outputs)
    if not all(output is None or isinstance(output, TensorType) for output in types):
        raise ValueError(f"{op}: its outputs are {outputs!r}, expected tensors")
    return Call(
        str(op),
        tuple(_argument_from_json(argument) for argument in args),
        tuple((str(name), _argument_from_json(value)) for name, value in kwargs.items()),
        types,  # type: ignore[arg-type]  # checked above
    )


def _argument_to_json(argument: Argument) -> Any:
    """A tensor becomes ``{"dtype": shape}``, so that it cannot be taken for a list of integers; an infinity or NaN,
    which JSON lacks, ``{"float": text}``."""
    if isinstance(argument, TensorType):
        return {argument.dtype: list(argument.shape)}
    if isinstance(argument, tuple):
        return [_argument_to_json(item) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    return argument


def _argument_from_json(data: Any) -> Argument:
    if isinstance(data, dict):
        ((dtype, shape),) = data.items()
        if isinstance(shape, str):
            return float(shape)
        return TensorType(tuple(int(size) for size in shape), str(dtype))
    if isinstance(data, list):
        return tuple(_argument_from_json(item) for item in data)
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    raise ValueError(f"{data!r} is no operator argument")
