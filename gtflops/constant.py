"""The forward pass without blocks: which operators give the same in every epoch, and the least to store of them.

The graph is cut, not the model: :mod:`gtflops.blocks` says what the trainers leave out, this what there is to leave.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gtflops.blocks import WRITES, is_never_constant, state_written
from gtflops.graph import GETITEM, Graph, Node, Phase
from gtflops.operators import Call
from gtflops.units import FLOPS_PER_MAC

_DROPOUT = re.compile(r"aten\.(bernoulli_?|native_dropout|_fused_dropout)")
_WITH_DROPOUT = re.compile(r"attention|_rnn")  # their only positional float is its probability

_SOURCE, _SINK = -1, -2


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the forward pass that is stored: the node of the graph that makes it, and its size."""

    name: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ConstantPart:
    """The forward pass of later epochs, where what is constant for an example is stored at its cheapest boundary.

    FLOPs that are not run again (``flops``), those of cheap constant operators that are run again from what is stored
    (``recomputed``), and those that depend on what is trained (``variable``): together the forward pass. ``stored``
    in the order of the forward pass.
    """

    flops: int
    recomputed: int
    variable: int
    stored: tuple[StoredTensor, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all that is stored, for the batch that was traced."""
        return sum(tensor.num_bytes for tensor in self.stored)


def constant_part(
    graph: Graph, prices: npt.NDArray[np.int64], trained: Collection[str], run_after: Collection[int]
) -> ConstantPart:
    """What :meth:`gtflops.Profile.constant_part` says; ``run_after`` are the nodes that run after the forward pass.

    A minimum vertex cut: each constant operator is a vertex with the bytes of its output, the dear ones are sources,
    and what is read by others than constant operators are sinks.
    """
    nodes = graph.nodes
    reads, memory = _reads(graph)
    sizes = [_bytes_of(graph, index, memory) for index in range(len(nodes))]
    dear = {index for index in np.flatnonzero(prices[0]).tolist() if _is_dear(nodes[index], int(prices[0, index]))}
    variable = _variable(graph, reads, trained, _unstorable(graph, reads, dear, sizes))
    constant = [node.phase is Phase.FORWARD and not varies for node, varies in zip(nodes, variable, strict=True)]
    readers = {index for index, varies in enumerate(variable) if varies and nodes[index].phase is Phase.FORWARD}
    wanted = {source for index in readers.union(run_after) for source in reads[index] if constant[source]}
    if constant[graph.loss]:
        wanted.add(graph.loss)
    cut = _minimum_cut(reads, constant, dear, wanted, sizes)
    again = _walk(reads, constant, wanted, cut) - cut
    assert not again & dear
    flops = prices.sum(axis=0)
    forward = sum(int(flops[index]) for index, node in enumerate(nodes) if node.phase is Phase.FORWARD)
    changing, recomputed = (sum(int(flops[index]) for index in part) for part in (readers, again))
    stored = []
    for index in sorted(cut):
        node, whole = nodes[index], nodes[memory.get(index, index)]
        output, size = whole.call.output, sizes[index]
        assert size is not None
        stored.append(StoredTensor(node.name, node.module, node.source, output.shape, output.dtype, size))
    return ConstantPart(forward - changing - recomputed, recomputed, changing, tuple(stored))


def _is_dear(node: Node, matmul: int) -> bool:
    """Whether an operator is to be run once: a product with sums, not one with a multiplication an element.

    The tables of angles of rotary positions are such outer products.
    """
    return matmul > FLOPS_PER_MAC * sum(output.numel for output in node.call.outputs if output is not None)


def _reads(graph: Graph) -> tuple[list[tuple[int, ...]], dict[int, int]]:
    """What each node reads, with writes in place as states of the memory; and, for each write, what made its memory.

    A write makes the whole memory anew out of what was in it. What reads a view of the memory after that reads the last
    write, and no longer what was there when the view was taken.
    """
    reads: list[tuple[int, ...]] = []
    made_by: dict[int, int] = {}
    last_write: dict[int, int] = {}
    memory: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        inputs = set(node.inputs)
        for source in node.inputs:
            storage = graph.nodes[source].storage
            if storage is not None and source < last_write.get(storage, -1) and last_write[storage] in inputs:
                inputs.discard(source)
        if node.storage is not None:
            first = made_by.setdefault(node.storage, index)
            if first != index and WRITES.search(node.call.op):
                inputs.add(last_write.get(node.storage, first))
                last_write[node.storage], memory[index] = index, first
        reads.append(tuple(sorted(inputs)))
    return reads, memory


def _bytes_of(graph: Graph, index: int, memory: Mapping[int, int]) -> int | None:
    """Bytes to store for a node, of a write all of its memory; ``None`` where it is no tensor that can be stored.

    What is larger than its memory was expanded: what it was expanded from is stored instead.
    """
    node = graph.nodes[index]
    if node.storage is None:
        return None
    whole, own = graph.storage_bytes[node.storage], node.call.output.num_bytes
    if index in memory:
        return whole
    return own if own <= whole else None


def _unstorable(
    graph: Graph, reads: Sequence[Sequence[int]], dear: Collection[int], sizes: Sequence[int | None]
) -> set[int]:
    """Dear operators that give no tensor, and whose outcome is yet read, in memory that they wrote into."""
    return {
        source
        for index, node in enumerate(graph.nodes)
        if node.call.op != GETITEM
        for source in reads[index]
        if source in dear and sizes[source] is None
    }


def _variable(
    graph: Graph, reads: Sequence[Sequence[int]], trained: Collection[str], unstorable: Collection[int]
) -> list[bool]:
    """Which nodes may be another in the next epoch; those after the forward pass are not looked at."""
    nodes = graph.nodes
    written = state_written(graph)
    variable = [node.phase is Phase.PARAMETER and node.name in trained for node in nodes]
    for index, node in enumerate(nodes):
        if node.phase is Phase.FORWARD:
            variable[index] = (
                is_never_constant(node.call)
                or _drops_out(node.call)
                or index in unstorable
                or any(variable[source] or nodes[source].storage in written for source in reads[index])
            )
    return variable


def _drops_out(call: Call) -> bool:
    name = call.op.rsplit(".", 1)[0]
    if _WITH_DROPOUT.search(name):
        return any(isinstance(argument, float) and argument > 0 for argument in call.args)
    return _DROPOUT.fullmatch(name) is not None


def _minimum_cut(
    reads: Sequence[Sequence[int]],
    constant: Sequence[bool],
    dear: Collection[int],
    wanted: Collection[int],
    sizes: Sequence[int | None],
) -> set[int]:
    """The nodes of fewest bytes without which no dear one reaches what is wanted; of several sets, the last.

    A path is cut after the last dear operator on it: what stands before that is left out.
    """
    import networkx  # takes longer to import than the rest

    behind = _walk(reads, constant, wanted, dear)
    between: set[int] = set()
    cuttable: networkx.DiGraph[int] = networkx.DiGraph()
    for index in sorted(behind):
        arrival, departure = 2 * index, 2 * index + 1
        sources = [_SOURCE] if index in dear else [2 * before + 1 for before in reads[index] if before in between]
        if not sources:
            continue  # no dear operator stands before it
        between.add(index)
        cuttable.add_edges_from((source, arrival) for source in sources)
        if sizes[index] is None:
            cuttable.add_edge(arrival, departure)  # an edge without a capacity is never cut
        else:
            cuttable.add_edge(arrival, departure, capacity=sizes[index])
        if index in wanted:
            cuttable.add_edge(departure, _SINK)
    if not between:
        return set()
    _, (_, after) = networkx.minimum_cut(cuttable, _SOURCE, _SINK)
    return {index for index in between if 2 * index not in after and 2 * index + 1 in after}


def _walk(
    reads: Sequence[Sequence[int]], constant: Sequence[bool], start: Collection[int], stop: Collection[int]
) -> set[int]:
    """The constant operators that ``start`` depends on, itself included, and not what stands before ``stop``."""
    found, stack = set(start), list(start)
    while stack:
        index = stack.pop()
        if index not in stop:
            new = {source for source in reads[index] if constant[source]} - found
            found |= new
            stack += new
    return found
