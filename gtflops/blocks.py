"""The forward pass in blocks: which of it is the same in every epoch, so that it can be stored instead of computed.

A *block* is a module in a list of modules (``model.layers.3``), the outermost of those around an operator. A block that
depends on no trained tensor gives the same activations for an example in every epoch: what the last such block of a
list gives is stored in the first pass, and none of them is run again. Dropout is left out in them then. Where a part
above takes what a block gives (of CLIP, LLaVA takes the last but one), no block behind that one can be left out.

What a decoder beside an encoder is given is made of the labels, padded to the longest of the batch: its blocks do not
give the same for an example in other company.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gtflops.graph import Graph, Phase
from gtflops.operators import Call

#: Operators that give others each time, besides those of dropout: what depends on them is never constant.
_RANDOM = re.compile(
    r"aten\.((rand|randn|randint)(_like)?|randperm|(normal|uniform|exponential|geometric|cauchy|log_normal|random)_?|"
    r"multinomial|poisson|binomial|rrelu_with_noise|_sample_dirichlet|_standard_gamma)"
)

#: Arguments of forward passes that are there for the loss: blocks that depend on them are a decoder's.
TARGETS = frozenset(
    {
        "labels",
        "label",
        "label_ids",
        "next_sentence_label",
        "sentence_order_label",
        "start_positions",
        "end_positions",
        "num_items_in_batch",
        "shift_labels",
    }
)

#: Operators that write into memory that they are given.
WRITES = re.compile(r"_(\.\w+)?$|out$")
_BEFORE = (Phase.PARAMETER, Phase.BUFFER, Phase.BATCH, Phase.CONSTANT)


@dataclass(frozen=True)
class Block:
    """A block of the forward pass.

    ``depends_on`` has bit k set where it depends on tensor k (in backward order), and the bit after the last tensor
    where it is never constant (random numbers, batch statistics, labels), or cannot be left out because something above
    takes what a block in front of it gives. ``nodes`` are the indices of its forward operators, without those that only
    prepare what other blocks take from it besides activations (T5's first block makes the position bias of all): these
    contain no matrix product, and run in any case.
    """

    name: str
    depends_on: int
    nodes: tuple[int, ...]


def block_of(module: str) -> str | None:
    """The block that a module belongs to, by its path.

    >>> block_of("model.layers.3.mlp.experts.0"), block_of("lm_head")
    ('model.layers.3', None)
    """
    parts = module.split(".")
    for end, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: end + 1])
    return None


def blocks(graph: Graph, names: Sequence[str], prices: npt.NDArray[np.int64]) -> tuple[Block, ...]:
    """The blocks of a graph, in the order of the forward pass. Time O(nodes x tensors / 64).

    ``prices`` as of :class:`gtflops.Profile`, int64 [2, nodes]: matrix products and the rest.
    """
    nodes = graph.nodes
    written = state_written(graph)
    moved_by = {name: 1 << k for k, name in enumerate(names) if graph.gradients[name] is not None}
    for uses, _ in graph.uses:  # training one use moves what the others read
        moved_by.update(dict.fromkeys(uses, sum(moved_by.get(name, 0) for name in uses)))
    never = 1 << len(names)
    depends_on = [0] * len(nodes)
    computed = [False] * len(nodes)  # from a matrix product of a block
    members: dict[str, list[int]] = {}
    path_of: dict[int, str] = {}
    for index, node in enumerate(nodes):
        if node.phase is Phase.PARAMETER:
            depends_on[index] = moved_by.get(node.name, 0)
        if node.phase is Phase.BATCH and (node.name in TARGETS or node.name.startswith("decoder_")):
            depends_on[index] = never
        if node.phase is not Phase.FORWARD:
            continue
        for source in node.inputs:
            depends_on[index] |= depends_on[source]
            computed[index] |= computed[source]
        if is_never_constant(node.call) or any(nodes[source].storage in written for source in node.inputs):
            depends_on[index] |= never
        if (path := block_of(node.module)) is not None:
            members.setdefault(path, []).append(index)
            path_of[index] = path
            computed[index] |= bool(prices[0, index])
    prepares = _prepared_for_others(graph, path_of, computed)
    needed = _behind_what_others_take(graph, {index: path for index, path in path_of.items() if index not in prepares})
    found = []
    for path, indices in members.items():
        union = never if path in needed else 0
        for index in indices:
            union |= depends_on[index]
        found.append(Block(path, union, tuple(index for index in indices if index not in prepares)))
    return tuple(found)


def skipped(blocks: Iterable[Block], trained: int) -> tuple[Block, ...]:
    """The blocks that need not be run again for an example where the tensors of these bits are trained."""
    return tuple(block for block in blocks if not block.depends_on & trained)


def boundary_bytes(graph: Graph, left_out: Iterable[Block]) -> int:
    """Bytes, for the batch that was traced, of what the rest of the forward pass takes from these blocks."""
    inside = {index for block in left_out for index in block.nodes}
    taken = {
        graph.nodes[source].storage
        for index, node in enumerate(graph.nodes)
        if index not in inside and node.phase is Phase.FORWARD
        for source in node.inputs
        if source in inside
    }
    return sum(graph.storage_bytes[storage] for storage in taken if storage is not None)


def state_written(graph: Graph) -> set[int]:
    """The memory, there before the step, that its forward pass writes into: what reads it gives another each time."""
    before = {node.storage for node in graph.nodes if node.phase in _BEFORE}
    written = {
        node.storage
        for node in graph.nodes
        if node.phase is Phase.FORWARD and node.storage in before and WRITES.search(node.call.op)
    }
    return {storage for storage in written if storage is not None}


def is_never_constant(call: Call) -> bool:
    """Whether an operator gives others each time, or an example's output depends on the others of its batch."""
    name = call.op.rsplit(".", 1)[0]
    if "batch_norm" in name and "backward" not in name and not name.endswith(("_no_training", "_no_update")):
        return next((argument for argument in call.args if isinstance(argument, bool)), True)  # training
    return _RANDOM.fullmatch(name) is not None


def _prepared_for_others(graph: Graph, path_of: Mapping[int, str], computed: Sequence[bool]) -> set[int]:
    """Operators in blocks that no matrix product stands before, and that others than their own block need."""
    prepares: set[int] = set()
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        if node.phase is not Phase.FORWARD:
            continue
        for source in node.inputs:
            if source not in path_of or computed[source]:
                continue
            if index in prepares or path_of.get(index) != path_of[source]:
                prepares.add(source)
    return prepares


def _behind_what_others_take(graph: Graph, path_of: Mapping[int, str]) -> set[str]:
    """The blocks that cannot be left out: what a block in front of them in their list gives goes to the loss, or to a
    block behind them, by a way around them, and only what the last block that is left out gives is stored."""
    place_of = {path: (path.rpartition(".")[0], int(path.rpartition(".")[2])) for path in set(path_of.values())}
    #: By operator, and by list of blocks that it is not in: the number of the first block whose output gets there.
    arrives: list[dict[str, int]] = [{} for _ in graph.nodes]
    #: By list, the number of the first block whose output gets elsewhere than to the next one.
    taken: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if node.phase is not Phase.FORWARD:
            continue
        its = arrives[index]
        for source in node.inputs:
            for parent, number in arrives[source].items():
                its[parent] = min(number, its.get(parent, number))
            if source in path_of:
                parent, number = place_of[path_of[source]]
                its[parent] = min(number, its.get(parent, number))
        if index in path_of:
            parent, number = place_of[path_of[index]]
            first = its.pop(parent, number)
            if first + 1 < number:
                taken[parent] = min(first, taken.get(parent, first))
    for parent, number in arrives[graph.loss].items():
        taken[parent] = min(number, taken.get(parent, number))
    return {path for path, (parent, number) in place_of.items() if number > taken.get(parent, number)}
