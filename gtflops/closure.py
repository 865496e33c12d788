"""What autograd executes for a selection: the closure of its gradients among the operators after the forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from gtflops import _core
from gtflops.graph import Graph, Phase

#: Phases whose operators run for the gradients that need them.
AFTER_FORWARD = (Phase.BACKWARD, Phase.RECOMPUTE)


def needed_by(graph: Graph, names: Sequence[str]) -> list[int]:
    """For each node, the set of tensors whose gradients need it, as the bits of an integer.

    Bit k stands for tensor ``names[k]``, bit ``len(names)`` for what runs whatever is trained. Time and memory
    O(nodes x tensors / 64).
    """
    nodes = graph.nodes
    needed = [0] * len(nodes)
    for position, name in enumerate(names):
        gradient = graph.gradients[name]
        if gradient is not None:
            needed[gradient] |= 1 << position
    for index in graph.always:
        needed[index] |= 1 << len(names)
    for index in range(len(nodes) - 1, -1, -1):
        if needed[index] and nodes[index].phase in AFTER_FORWARD:
            for source in nodes[index].inputs:
                needed[source] |= needed[index]
    return needed


def saved_bytes(graph: Graph, needed: Sequence[int]) -> dict[int, int]:
    """Bytes of the memory that autograd keeps from the forward pass, by who needs what reads it (:func:`needed_by`).

    A piece of memory is there before the step if a parameter, a buffer or the batch lies in it.
    """
    readers: dict[int, int] = {}
    before: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.phase in AFTER_FORWARD:
            for source in node.inputs:
                storage = graph.nodes[source].storage
                # The backward pass begins by looking at the shape of the loss; that keeps nothing.
                if graph.nodes[source].phase is Phase.FORWARD and storage is not None and source != graph.loss:
                    readers[storage] = readers.get(storage, 0) | needed[index]
        elif node.phase is not Phase.FORWARD and node.storage is not None:
            before.add(node.storage)
    for storage, positions in graph.kept:
        for index in positions:
            readers[storage] = readers.get(storage, 0) | needed[index]
    by_readers: dict[int, int] = {}
    for storage, tensors in readers.items():
        if storage not in before and tensors:
            by_readers[tensors] = by_readers.get(tensors, 0) + graph.storage_bytes[storage]
    return by_readers


class CopiedByFields:
    """A dataclass of which a copy, or a pickle, has the fields: what is cached, partly in C++, is worked out again."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Segments:
    """Operators after the forward pass, merged by the set of tensors that need them.

    ``needed_by[s]`` has bit k set where tensor k (in backward order) needs segment s. ``costs`` is int64
    [4, segments]: backward matrix products and the rest, then the same of what is recomputed, and a fifth row for the
    forward pass where part of it is needed by some tensors only; ``always``, int64 [4], is the cost of what runs
    whatever is trained, which is in no segment. Segments stand in an order in which each
    depends on earlier ones only.
    """

    needed_by: tuple[int, ...]
    dependencies: tuple[tuple[int, ...], ...]
    gradient_of: tuple[tuple[int, ...], ...]
    costs: npt.NDArray[np.int64]
    always: npt.NDArray[np.int64]

    @classmethod
    def of(cls, graph: Graph, names: Sequence[str], needed: Sequence[int], prices: npt.NDArray[np.int64]) -> "Segments":
        """From what :func:`needed_by` gives and int64 prices [2, nodes], matrix products and the rest."""
        nodes, every_time = graph.nodes, 1 << len(names)
        runs = [index for index, node in enumerate(nodes) if node.phase in AFTER_FORWARD and needed[index]]
        sometimes = [index for index in runs if needed[index] < every_time]
        digests = {index: _digest(needed[index]) for index in sometimes}
        # What a node depends on is needed by whoever needs the node, and by more where the sets differ: larger
        # sets first is an order in which dependencies stand before.
        by_digest = {digests[index]: needed[index] for index in sometimes}
        order = sorted(by_digest, key=lambda digest: (-by_digest[digest].bit_count(), by_digest[digest]))
        sets = [by_digest[digest] for digest in order]
        place = {digest: segment for segment, digest in enumerate(order)}
        segment_of = {index: place[digest] for index, digest in digests.items()}
        dependencies: list[set[int]] = [set() for _ in sets]
        for index, segment in segment_of.items():
            dependencies[segment].update(segment_of[source] for source in nodes[index].inputs if source in segment_of)
            dependencies[segment].discard(segment)
        costs = np.zeros((4, len(sets) + 1), dtype=np.int64)  # the last column: always
        rows = np.array([2 * AFTER_FORWARD.index(nodes[index].phase) for index in runs], dtype=np.intp)
        columns = np.array([segment_of.get(index, len(sets)) for index in runs], dtype=np.intp)
        for column in (0, 1):
            np.add.at(costs, (rows + column, columns), prices[column, runs])
        gradients = [graph.gradients[name] for name in names]
        own = [None if node is None else place.get(digests.get(node) or _digest(needed[node])) for node in gradients]
        return cls(
            needed_by=tuple(sets),
            dependencies=tuple(tuple(sorted(sources)) for sources in dependencies),
            gradient_of=tuple(() if segment is None else (segment,) for segment in own),
            costs=np.ascontiguousarray(costs[:, :-1]),
            always=costs[:, -1].copy(),
        )

    def chain_costs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What each tensor alone needs, and what it adds to what those before it need: int64 [tensors], twice."""
        own, shared = np.zeros((2, len(self.gradient_of)), dtype=np.int64)
        for tensors, cost in zip(self.needed_by, self.costs.sum(axis=0), strict=True):
            nearest = (tensors & -tensors).bit_length() - 1
            (own if tensors == 1 << nearest else shared)[nearest] += cost
        own.flags.writeable = shared.flags.writeable = False
        return own, shared

    def with_forward(self, pieces: Sequence[tuple[int, int]]) -> "Segments":
        """The same, and pieces of the forward pass among them: for each the tensors that need it, and its cost."""
        segment_of = {_digest(tensors): segment for segment, tensors in enumerate(self.needed_by)}
        places = [segment_of.setdefault(_digest(tensors), len(segment_of)) for tensors, _ in pieces]
        new = {
            place: tensors for place, (tensors, _) in zip(places, pieces, strict=True) if place >= len(self.needed_by)
        }
        costs = np.zeros((5, len(segment_of)), dtype=np.int64)
        costs[:4, : len(self.needed_by)] = self.costs
        np.add.at(costs[4], np.array(places, dtype=np.intp), np.array([cost for _, cost in pieces], dtype=np.int64))
        return replace(
            self,
            needed_by=(*self.needed_by, *new.values()),
            dependencies=(*self.dependencies, *(() for _ in new)),
            gradient_of=tuple(
                (*segments, *(place for place, tensors in new.items() if tensors >> position & 1))
                for position, segments in enumerate(self.gradient_of)
            ),
            costs=costs,
        )

    def closure_costs(self) -> _core.ClosureCosts:
        """The C++ object that answers queries."""
        return _core.ClosureCosts(*csr(self.dependencies), *csr(self.gradient_of), self.costs)


def _digest(tensors: int) -> bytes:
    """Stands for a set of tensors in a dict: of Python's own hashes of integers, all powers of two have but 61."""
    return blake2b(tensors.to_bytes(tensors.bit_length() // 8 + 1, "little"), digest_size=16).digest()


def csr(lists: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and concatenation of integer lists."""
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return offsets, np.array([item for items in lists for item in items], dtype=np.int64)
