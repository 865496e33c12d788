"""Graph + operator table -> Profile: what a training step costs, exactly, for any choice of trainable tensors."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gtflops import _core
from gtflops.blocks import Block, blocks, boundary_bytes, skipped
from gtflops.closure import AFTER_FORWARD, CopiedByFields, Segments, needed_by, saved_bytes
from gtflops.compiled import CompiledStep
from gtflops.constant import ConstantPart, constant_part
from gtflops.errors import InputError, SavedFileError, UnsupportedModelError, UnsupportedOperatorError
from gtflops.files import write_whole
from gtflops.forms import CostName, GraphForm, Sum
from gtflops.graph import GETITEM, Graph, Node, Phase, Uses
from gtflops.operators import Entry, registrations
from gtflops.shapes import Family, Interpolated, Shapes, Sizes, Traced
from gtflops.sources import Live, Named
from gtflops.tariff import STEP, Tariff, node_prices
from gtflops.units import format_flops

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from gtflops.capture.batches import Loss
    from gtflops.selection import Selection
    from gtflops.training.records import TrainingLog
    from gtflops.verification import Verification

FORMAT = "gtflops-profile"
FORMAT_VERSION = 3

TIMED = "operators were timed "  # so begins the note of what ``nanoseconds`` were measured on

Ops: TypeAlias = Literal["all", "matmul"]
Reuse: TypeAlias = Literal["prefix"]


@runtime_checkable
class HasParameters(Protocol):
    """A model, as far as a profile needs to know one."""

    def named_parameters(self) -> Iterable[tuple[str, Any]]: ...


#: Names, a bool array aligned with ``profile.tensors``, a model (its ``requires_grad``), ``"all"`` or ``"none"``.
Trainable: TypeAlias = "Iterable[str] | npt.NDArray[np.bool_] | HasParameters | Literal['all', 'none']"


@dataclass(frozen=True, slots=True)
class TensorCost:
    """A parameter tensor that can be trained, and what its gradient costs (FLOPs, both columns).

    ``dw_flops``: backward operators that only this tensor's gradient needs. ``dy_flops``: activation-gradient
    operators that it adds to what the tensors nearer to the loss already need. ``has_gradient`` is false where the
    loss does not depend on the tensor.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: str
    module: str
    dw_flops: int
    dy_flops: int
    has_gradient: bool


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one training step."""

    forward: int
    backward: int
    recompute: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True, slots=True)
class ReusedStep(StepFlops):
    """FLOPs of one training step in which the activations below the trained tensors are read from a store.

    ``blocks``, by the path of their module, are not run; ``stored`` is what their forward pass costs, in the first
    epoch only; ``cache_bytes`` what has to be stored of them for this batch.
    """

    stored: int
    cache_bytes: int
    blocks: tuple[str, ...]

    @property
    def first(self) -> int:
        """FLOPs of the step in the first epoch, which fills the store."""
        return self.total + self.stored


@dataclass(frozen=True, slots=True)
class UnsupportedOperator:
    """An operator without a price: its name, how often it ran, and the modules it ran in (the first few)."""

    name: str
    count: int
    where: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Profile(CopiedByFields):
    """The cost of one training step, for every selection of trainable tensors.

    ``prices`` has two rows, matrix products and everything else, and a column for each node of ``graph``; a
    selection's backward cost is the sum over the nodes that its gradients depend on (its closure), which is what
    autograd executes. ``notes`` say what was assumed; ``versions`` what made the profile. ``compiled`` holds what
    ``torch.compile`` would run of the step, where it was asked for. ``nanoseconds``, one for each node, are what its
    operator takes on a device, 0 where nothing runs; :func:`gtflops.measure_time` gives a profile that has them.

    >>> import gtflops, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 1, bias=False))
    >>> profile = gtflops.profile(model, torch.ones(7, 3), loss=lambda y, x: y.sum())
    >>> profile.step_flops("all", ops="matmul")       # 2 * 7 * (3*5 + 5*1), and backward: both dw, one dy
    StepFlops(forward=280, backward=350, recompute=0)
    >>> profile.step_flops(["1.weight"], ops="matmul").backward
    70
    """

    graph: Graph
    prices: npt.NDArray[np.int64]
    unsupported: tuple[UnsupportedOperator, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    compiled: CompiledStep | None = None
    nanoseconds: npt.NDArray[np.int64] | None = None
    _shapes: Shapes | None = field(default=None, repr=False)
    _sizes: Sizes | None = field(default=None, repr=False)  # where this is not the shape that was profiled first

    @classmethod
    def from_graph(
        cls, graph: Graph, notes: Iterable[str] = (), versions: Mapping[str, str] | None = None
    ) -> "Profile":
        """Price every node of a graph by the operator table."""
        prices, where = node_prices(graph)
        columns = _columns(graph, [flops.matmul for flops in prices], [flops.other for flops in prices])
        unsupported = tuple(
            UnsupportedOperator(op, counts.total(), tuple(module for module, _ in counts.most_common(3)))
            for op, counts in sorted(where.items())
        )
        unused = [name for name, gradient in graph.gradients.items() if gradient is None]
        all_notes = list(notes)
        if unused:
            all_notes.append(f"the loss does not depend on {len(unused)} tensors, first {unused[0]}")
        return cls(
            graph,
            columns,
            unsupported,
            tuple(dict.fromkeys(all_notes)),
            dict(versions or {"gtflops": version("gtflops")}),
        )

    def __repr__(self) -> str:
        return f"Profile({self.graph.model}: {len(self.names)} tensors, full step {format_flops(self.full_flops)})"

    # --- the tensors, in backward order -------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in backward order: by when their gradient is computed; those without one last."""
        end = len(self.graph.nodes)
        gradients = self.graph.gradients
        return tuple(sorted(gradients, key=lambda name: end if (node := gradients[name]) is None else node))

    @cached_property
    def tensors(self) -> tuple[TensorCost, ...]:
        """Every tensor that can be trained, in backward order."""
        return tuple(
            TensorCost(
                name=node.name,
                shape=node.call.output.shape,
                numel=node.call.output.numel,
                dtype=node.call.output.dtype,
                module=node.module,
                dw_flops=int(dw),
                dy_flops=int(dy),
                has_gradient=has_gradient,
            )
            for (node, has_gradient), dw, dy in zip(self._parameters, self.t_dw, self.t_dy, strict=True)
        )

    @cached_property
    def _parameters(self) -> tuple[tuple[Node, bool], ...]:
        """The node of each tensor, and whether the loss depends on it."""
        nodes = {node.name: node for node in self.graph.nodes if node.phase is Phase.PARAMETER}
        return tuple((nodes[name], self.graph.gradients[name] is not None) for name in self.names)

    @cached_property
    def _with_gradient(self) -> frozenset[str]:
        return frozenset(node.name for node, has_gradient in self._parameters if has_gradient)

    @cached_property
    def t_dw(self) -> npt.NDArray[np.int64]:
        """FLOPs of the backward operators that only a tensor's own gradient needs, aligned with ``tensors``.

        Of the uses of a shared tensor (``uses="separate"``), all but the one nearest to the loss have the addition of
        their gradient to that of the others in it, so that a step costs no more than the sum of its parts.
        """
        return self._chain_costs[0]

    @cached_property
    def t_dy(self) -> npt.NDArray[np.int64]:
        """FLOPs of the activation gradients that a tensor adds to the tensors before it, aligned with ``tensors``."""
        return self._chain_costs[1]

    @cached_property
    def _chain_costs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        own, shared = self._segments.chain_costs()
        own = own + sum(one.at_most() for one in self._sums)
        own.flags.writeable = False
        return own, shared

    # --- costs --------------------------------------------------------------------------------------------------

    @cached_property
    def forward_flops(self) -> int:
        """``T_fp``: FLOPs of the forward pass, loss included."""
        return int(self._forward.sum())

    @cached_property
    def full_flops(self) -> int:
        """``T_full``: FLOPs of a step with every tensor trained."""
        return self.step_flops("all").total

    @cached_property
    def _forward(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.prices[:, self._in_forward].sum(axis=1))

    @cached_property
    def _in_forward(self) -> npt.NDArray[np.bool_]:
        return np.array([node.phase is Phase.FORWARD for node in self.graph.nodes], dtype=np.bool_)

    @cached_property
    def needed_by(self) -> list[int]:
        """For each node of the graph, the bits of the tensors that need it: :func:`gtflops.closure.needed_by`."""
        return needed_by(self.graph, self.names)

    @cached_property
    def _segments(self) -> Segments:
        return Segments.of(self.graph, self.names, self.needed_by, self.prices)

    @cached_property
    def _uses(self) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
        return self.graph.uses

    @cached_property
    def _sums(self) -> tuple[Sum, ...]:
        """FLOPs of adding up gradients. They are the same for every batch."""
        return self._sums_at(self.prices[0] + self.prices[1])

    def _sums_at(self, costs: npt.NDArray[np.int64]) -> tuple[Sum, ...]:
        return tuple(
            Sum(self.mask(self._with_gradient.intersection(names)).astype(np.int64), int(costs[nodes[0]]))
            for names, nodes in self._uses
            if nodes
        )

    def partial(self, trainable: Trainable) -> tuple[str, ...]:
        """The trained uses of tensors that are not trained through all of their uses: in ``uses="separate"``.

        What such a tensor is moved by is a part of the gradient of the loss.
        """
        mask = self.mask(trainable)
        trained = {name for name, is_trained in zip(self.names, mask, strict=True) if is_trained}
        part = set()
        for names, _ in self._uses:
            if not trained.issuperset(self._with_gradient.intersection(names)):
                part.update(trained.intersection(names))
        return tuple(name for name in self.names if name in part)

    @cached_property
    def _closure(self) -> _core.ClosureCosts:
        return self._segments.closure_costs()

    def form(
        self,
        cost: CostName,
        epochs_left: int | None = None,
        held: tuple[str, ...] = (),
    ) -> GraphForm:
        """The problem of choosing tensors within a limit of FLOPs or nanoseconds, as the solver takes it.

        With ``epochs_left``, each example's activations below the trained tensors are stored in the first of so many
        epochs and read in the others, and costs are those of a step on average, rounded up by less than 1 a block.
        ``held`` are blocks whose activations are stored already: they are not run, and costs hold where nothing
        that :meth:`below` says is trained. InputError where times are asked for that were not measured, and
        UnsupportedModelError with ``epochs_left`` for a model without blocks.
        """
        key = cost, epochs_left, held
        if key not in self._forms:
            self._forms[key] = self._form(*key)
        return self._forms[key]

    def _form(self, cost: CostName, epochs_left: int | None, held: tuple[str, ...]) -> GraphForm:
        if cost == "flops":
            segments, forward, sums = self._segments, int(self._forward.sum()), self._sums
        elif self.nanoseconds is not None:
            sums = self._sums_at(self.nanoseconds)
            segments = Segments.of(self.graph, self.names, self.needed_by, self._times)
            forward = int(self.nanoseconds[self._in_forward].sum())
        else:
            raise InputError(
                f"this profile of {self.graph.model} has no times: gtflops.measure_time(profile, device) measures them"
            )
        base = forward + int(segments.always.sum())
        prices = self.prices if cost == "flops" else self._times
        if epochs_left is None:
            stored = sum(int(prices[:, block.nodes].sum()) for block in self._blocks_named(held))
            return GraphForm.of(base - stored, segments, sums)
        self._require_reusable()
        self.require_blocks()
        saved: list[tuple[int, int]] = []  # for each block, the tensors that need it in every epoch, and what it saves
        for block in self.blocks:
            if not block.depends_on >> len(self.names):
                flops = int(prices[:, block.nodes].sum())
                saved.append((block.depends_on, flops - -(-flops // epochs_left)))
        return GraphForm.of(
            base - sum(flops for _, flops in saved),
            segments.with_forward([piece for piece in saved if piece[0]]),
            sums,
        )

    def _require_reusable(self) -> None:
        if self.graph.always:
            raise InputError(
                f"this step of {self.graph.model} computes gradients of tensors that are no parameters, through all "
                "blocks whatever is trained; expected none for reuse='prefix': "
                "model.disable_input_require_grads() ends them"
            )

    def require_blocks(self) -> None:
        """UnsupportedModelError for a model in which there is nothing to leave out."""
        if not self.blocks:
            raise UnsupportedModelError(
                f"{self.graph.model} has no blocks that could be left out; expected a ModuleList or Sequential of "
                "them, as transformers' models have, or, in a loop of your own, a boundary of your own for "
                "gtflops.reuse.Prefix"
            )

    @cached_property
    def _times(self) -> npt.NDArray[np.int64]:
        """Nanoseconds in place of prices."""
        assert self.nanoseconds is not None
        return np.stack([self.nanoseconds, np.zeros_like(self.nanoseconds)])

    @cached_property
    def _forms(self) -> dict[tuple[Any, ...], GraphForm]:
        return {}

    def stored_flops(self, blocks: Iterable[str]) -> int:
        """FLOPs of the forward pass of these blocks: what a step saves that reads what they compute from a store.

        InputError for what is no block of the model.
        """
        return sum(int(self.prices[:, block.nodes].sum()) for block in self._blocks_named(blocks))

    def cache_bytes(self, blocks: Iterable[str]) -> int:
        """Bytes of what the rest of the forward pass takes from these blocks, for the batch of this profile.

        InputError for what is no block of the model.
        """
        return boundary_bytes(self.graph, self._blocks_named(blocks))

    def below(self, blocks: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Which tensors these blocks depend on: bool [tensors]. InputError for what is no block of the model."""
        union = 0
        for block in self._blocks_named(blocks):
            union |= block.depends_on
        return np.array([bool(union >> position & 1) for position in range(len(self.names))], dtype=np.bool_)

    def _blocks_named(self, names: Iterable[str]) -> list[Block]:
        wanted = list(names)
        if not wanted:
            return []
        known = {block.name: block for block in self.blocks}
        if unknown := [name for name in wanted if name not in known]:
            raise InputError(f"{self.graph.model} has no block {unknown[0]!r}; expected some of {', '.join(known)}")
        return [known[name] for name in wanted]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the forward pass, in its order: :func:`gtflops.blocks.blocks`."""
        return blocks(self.graph, self.names, self.prices)

    @overload
    def step_flops(self, trainable: Trainable, ops: Ops = "all", *, reuse: None = None) -> StepFlops: ...

    @overload
    def step_flops(self, trainable: Trainable, ops: Ops = "all", *, reuse: Reuse) -> ReusedStep: ...

    def step_flops(self, trainable: Trainable, ops: Ops = "all", *, reuse: Reuse | None = None) -> StepFlops:
        """FLOPs of one training step in which exactly ``trainable`` receives gradients.

        ``ops="matmul"`` counts matrix products and convolutions only, PyTorch's own convention (products of a matrix
        and a vector, which PyTorch's counter leaves out, included); ``"all"`` everything that has a price (see
        ``unsupported``). Time is linear in the number of distinct stretches of the backward pass: some
        ten microseconds. InputError for a name that the profile does not have or a mask of the wrong length.

        ``reuse="prefix"`` is the step of a later epoch, where blocks that no trained tensor stands below are not run:
        what they give for an example was stored in the first epoch. Of an encoder-decoder, these are blocks of the
        encoder: the decoder's are given labels. A model without blocks has none. Dropout is off in them then; where it
        was on in the trace, ``stored`` has its few FLOPs all the same. Time is linear in the nodes of the graph:
        milliseconds.

        >>> import gtflops
        >>> profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
        >>> step = profile.step_flops(["model.decoder.layers.11.fc2.weight"], ops="matmul", reuse="prefix")
        >>> len(step.blocks), step.cache_bytes == 4 * 128 * 768 * 4  # one activation of 768 float32 a token
        (11, True)
        >>> step.forward + step.stored == profile.step_flops("none", ops="matmul").forward
        True
        """
        _checked(ops)
        mask = self.mask(trainable)
        matmul, other, matmul_again, other_again = self._closure.cost(mask) + self._segments.always
        rows = slice(1) if ops == "matmul" else slice(2)
        forward = int(self._forward[rows].sum())
        backward, recompute = (
            (matmul, matmul_again) if ops == "matmul" else (matmul + other, matmul_again + other_again)
        )
        if ops == "all":
            backward += sum(one.of(mask) for one in self._sums)
        if reuse is None:
            return StepFlops(forward, int(backward), int(recompute))
        if reuse != "prefix":
            raise InputError(f"reuse is {reuse!r}, expected 'prefix' or None")
        self._require_reusable()
        left_out = skipped(self.blocks, self._bits(mask) | 1 << len(self.names))
        stored = sum(int(self.prices[rows, block.nodes].sum()) for block in left_out)
        names = tuple(block.name for block in left_out)
        size = boundary_bytes(self.graph, left_out)
        return ReusedStep(forward - stored, int(backward), int(recompute), stored, size, names)

    def constant_part(self, trainable: Trainable) -> ConstantPart:
        """The forward operators that give the same in every epoch when exactly ``trainable`` trains, of any model.

        Those that depend on no trained tensor, no random number (dropout included: profile the model in eval mode, or
        with a probability of 0, to see what there is without) and no batch statistics. Dear ones, matrix products,
        convolutions and attention with more than one multiplication an element, are not run again; norms,
        activations, masks and views may be, from what is stored: the fewest bytes for which that holds, by a minimum
        cut. What mixes the examples of a batch in another way is the same only for the same batch.

        :meth:`step_flops` with ``reuse="prefix"`` is what the trainers can run, in whole blocks; this is what a finer
        boundary would save. Time is linear in the nodes of the graph but for the cut, which sees only what stands
        between the last dear operators and what reads them: some 0.1 s for 30 layers, 8,000 nodes. InputError as
        :meth:`step_flops`.

        >>> import gtflops, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 64))
        >>> profile = gtflops.profile(model, torch.ones(8, 64), loss=lambda y, x: y.sum())
        >>> part = profile.constant_part(["2.weight"])
        >>> [(tensor.module, tensor.shape) for tensor in part.stored], part.cache_bytes
        ([('1', (8, 4))], 128)
        >>> part.flops + part.recomputed + part.variable == profile.forward_flops
        True
        """
        mask = self.mask(trainable)
        self._require_reusable()
        selected = self._bits(mask) | 1 << len(self.names)
        trained = {name for name, chosen in zip(self.names, mask, strict=True) if chosen and self.graph.gradients[name]}
        for uses, _ in self.graph.uses:  # training one use moves what the others read
            trained |= set() if trained.isdisjoint(uses) else set(uses)
        run_after = [
            index
            for index, (node, needed) in enumerate(zip(self.graph.nodes, self.needed_by, strict=True))
            if node.phase in AFTER_FORWARD and needed & selected
        ]
        return constant_part(self.graph, self.prices, trained, run_after)

    def step_flops_of_many(self, trainables: npt.NDArray[np.bool_], ops: Ops = "all") -> npt.NDArray[np.int64]:
        """FLOPs of a step for many selections at once: int64 [selections, 3], forward, backward and recompute.

        ``trainables`` is bool [selections, tensors], a row for each selection as :meth:`mask` gives it. InputError
        for another shape or dtype.

        >>> import gtflops, numpy
        >>> profile = gtflops.profile("facebook/opt-125m", batch_size=1, seq_len=8)
        >>> masks = numpy.eye(len(profile.tensors), dtype=bool)  # each tensor alone
        >>> bool((profile.step_flops_of_many(masks).sum(axis=1) == profile.alone_flops).all())
        True
        """
        _checked(ops)
        width = len(self.names)
        if not isinstance(trainables, np.ndarray) or trainables.dtype != np.bool_ or trainables.shape[1:] != (width,):
            given = f"{trainables.dtype} {trainables.shape}" if isinstance(trainables, np.ndarray) else repr(trainables)
            raise InputError(f"trainables is {given}, expected a bool array of shape (selections, {width})")
        columns = self._closure.costs(trainables) + self._segments.always
        by_phase = columns.reshape(-1, 2, 2)[..., 0] if ops == "matmul" else columns.reshape(-1, 2, 2).sum(axis=2)
        if ops == "all":
            by_phase[:, 0] += sum(one.of_many(trainables) for one in self._sums)
        forward = int(self._forward[0] if ops == "matmul" else self._forward.sum())
        return np.column_stack([np.full(len(columns), forward, dtype=np.int64), by_phase])

    def own_flops(self, trainable: Trainable) -> int:
        """FLOPs of the operators of a step's backward pass that serve the gradient of one trained tensor alone."""
        own, _ = self._segments.chain_costs()
        return int(own[self.mask(trainable)].sum())

    @cached_property
    def alone_flops(self) -> npt.NDArray[np.int64]:
        """FLOPs of a step in which only one tensor is trained, for each, aligned with ``tensors``."""
        alone: npt.NDArray[np.int64] = self.step_flops_of_many(np.eye(len(self.names), dtype=np.bool_)).sum(axis=1)
        alone.flags.writeable = False
        return alone

    def step_seconds(self, trainable: Trainable) -> float:
        """Seconds of one training step in which exactly ``trainable`` receives gradients, as the sum of its operators.

        Forward and backward pass, as :meth:`step_flops`, without the optimizer; :func:`gtflops.measure_time` says what
        the sum leaves out. As fast as :meth:`step_flops`. InputError for a profile without times and as
        :meth:`step_flops`.
        """
        return self.form("time").total(self.mask(trainable)) / 1e9

    def activation_bytes(self, trainable: Trainable) -> int:
        """Bytes that autograd keeps from the forward pass for the backward, when exactly ``trainable`` trains.

        Each piece of memory counts once, whatever views of it are kept; parameters, buffers and the batch, which are
        there anyway, do not count. Time linear in the number of kept tensors.
        """
        selected = self._bits(self.mask(trainable)) | 1 << len(self.names)
        return sum(size for needed, size in self._saved_bytes.items() if needed & selected)

    @cached_property
    def _saved_bytes(self) -> dict[int, int]:
        return saved_bytes(self.graph, self.needed_by)

    def by_operator(self, trainable: Trainable = "all", ops: Ops = "all") -> dict[str, StepFlops]:
        """FLOPs of a step by operator, such as ``aten.mm.default``, the most expensive first."""
        nodes = self.graph.nodes
        # An operator priced by output carries its price on the nodes that pick its outputs.
        names = ((nodes[node.inputs[0]] if node.call.op == GETITEM else node).call.op for node in nodes)
        return self._totals(((name,) for name in names), trainable, ops)

    def by_module(self, trainable: Trainable = "all", ops: Ops = "all") -> dict[str, StepFlops]:
        """FLOPs of a step by path of module, each with all of its submodules; ``""`` is the whole model.

        The most expensive come first. The loss, where it is computed outside of the model, is in ``""`` only.
        """
        paths: dict[str, tuple[str, ...]] = {}
        for node in self.graph.nodes:
            if node.module not in paths:
                parts = node.module.split(".") if node.module else []
                paths[node.module] = tuple(".".join(parts[:end]) for end in range(len(parts) + 1))
        return self._totals((paths[node.module] for node in self.graph.nodes), trainable, ops)

    def _totals(self, keys: Iterable[tuple[str, ...]], trainable: Trainable, ops: Ops) -> dict[str, StepFlops]:
        """FLOPs of what a selection executes, summed for each of the keys that a node has."""
        prices = (self.prices[0] if _checked(ops) == "matmul" else self.prices.sum(axis=0)).tolist()
        mask = self.mask(trainable)
        selected = self._bits(mask) | 1 << len(self.names)
        adding = self._adding(mask)
        totals: dict[str, list[int]] = {}
        for index, (node, own_keys, flops, needed) in enumerate(
            zip(self.graph.nodes, keys, prices, self.needed_by, strict=True)
        ):
            runs = node.phase in AFTER_FORWARD and needed & selected
            if node.phase is Phase.FORWARD or runs or index in adding:
                for key in own_keys:
                    totals.setdefault(key, [0, 0, 0])[STEP.index(node.phase)] += flops
        steps = {key: StepFlops(*flops) for key, flops in totals.items()}
        return dict(sorted(steps.items(), key=lambda item: -item[1].total))

    def _adding(self, mask: npt.NDArray[np.bool_]) -> set[int]:
        """The nodes that add up the gradients of trained uses of a tensor."""
        with_nodes = [nodes for _, nodes in self._uses if nodes]
        numbers = [int(one.parts[mask].sum()) for one in self._sums]
        return {
            index for nodes, number in zip(with_nodes, numbers, strict=True) for index in nodes[: max(0, number - 1)]
        }

    def require_prices(self) -> None:
        """UnsupportedOperatorError, which names them, where operators of the step have no price."""
        if self.unsupported:
            listed = "; ".join(
                f"{op.name} ({op.count} times, in {', '.join(module or 'no submodule' for module in op.where)})"
                for op in self.unsupported
            )
            raise UnsupportedOperatorError(
                f"operators without a price: {listed}; their cost is unknown, so a budget would not hold. "
                "allow_unsupported=True counts them as free"
            )

    def require_fit(self, model: HasParameters) -> None:
        """InputError unless ``model`` has the tensors of the profile in their shapes, and no others to train."""
        parameters = self._tensors_of(model)
        others = [name for name in parameters.keys() - set(self.names) if parameters[name].is_floating_point()]
        if others:
            raise InputError(
                f"the model has {len(others)} tensors that the profile does not, such as {min(others)!r}; expected the "
                f"model that was profiled, a {self.graph.model}"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for tensor in self.tensors:
            if shapes.get(tensor.name) != tensor.shape:
                raise InputError(
                    f"the profile has a tensor {tensor.name!r} of shape {tensor.shape}, the model "
                    f"{shapes.get(tensor.name, 'none of that name')}; expected the model that was profiled, a "
                    f"{self.graph.model}"
                )

    def mask(self, trainable: Trainable) -> npt.NDArray[np.bool_]:
        """``trainable`` as a bool array aligned with ``tensors``."""
        if isinstance(trainable, np.ndarray):
            if trainable.dtype != np.bool_ or trainable.shape != (len(self.names),):
                raise InputError(
                    f"the mask has dtype {trainable.dtype} and shape {trainable.shape}, "
                    f"expected bool and ({len(self.names)},)"
                )
            return trainable
        if isinstance(trainable, str):
            if trainable not in ("all", "none"):
                raise InputError(f"trainable is {trainable!r}, expected 'all', 'none', names, a bool array or a model")
            return np.full(len(self.names), trainable == "all")
        if isinstance(trainable, HasParameters):
            trainable = [name for name, tensor in self._tensors_of(trainable).items() if tensor.requires_grad]
        if not isinstance(trainable, Iterable):
            raise InputError(f"trainable is {trainable!r}, expected 'all', 'none', names, a bool array or a model")
        mask = np.zeros(len(self.names), dtype=np.bool_)
        for name in trainable:
            position = self._position.get(name)
            if position is None:
                close = difflib.get_close_matches(str(name), self.names, n=3, cutoff=0.3)
                raise InputError(
                    f"the profile of {self.graph.model} has no tensor {name!r}; nearest: {', '.join(close) or 'none'}"
                )
            mask[position] = True
        return mask

    def _tensors_of(self, model: Any) -> dict[str, Any]:
        """What a model has, under the names that the profile gives it."""
        if not self._uses:
            return dict(model.named_parameters())
        from gtflops.capture.uses import named_tensors

        return dict(named_tensors(model, "separate"))

    @staticmethod
    def _bits(mask: npt.NDArray[np.bool_]) -> int:
        """A mask as an integer, bit k for tensor k."""
        return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.names)}

    # --- other shapes --------------------------------------------------------------------------------------------

    def at(
        self,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        decoder_len: int | None = None,
        num_targets: int | None = None,
    ) -> "Profile":
        """The profile of another batch shape: the same, to the integer, as profiling the model on such a batch.

        What is not given stays. ``decoder_len`` is the length of an encoder-decoder's labels, ``num_targets`` the
        number of target positions of a batch of :class:`gtflops.trimming.Trim`. The integers in a graph are polynomials
        of these sizes: after a few traces, other shapes between those traced need none; where the graph itself changes
        with the shape, and for a size of 1, a shape is traced. The last of ``notes`` says which. A model must still be
        there and as it was, a batch must tell which of its dimensions are which. InputError otherwise, and where the
        model refuses the shape.

        >>> import gtflops
        >>> short = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
        >>> long = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=256)
        >>> short.at(seq_len=256).full_flops == long.full_flops
        True
        """
        if self._shapes is None:
            raise InputError(
                f"this profile of {self.graph.model} was read from a file or copied, without a model to trace at other "
                "sizes; profile it again: gtflops.profile(model, batch).at(...)"
            )
        here = self._sizes or self._shapes.sizes
        sizes = here.changed(
            {"batch_size": batch_size, "seq_len": seq_len, "decoder_len": decoder_len, "num_targets": num_targets}
        )
        if sizes == here:
            return self
        if dict(self.versions) != _versions():
            raise InputError(
                f"the profile was made by {dict(self.versions)}, here are {_versions()}, which may execute other "
                "operators; profile the model again"
            )
        step = self._shapes.at(sizes)
        notes = step.notes
        if self.compiled is not None:
            notes = ("the compiled graph was of another shape and is left out: profile(..., graph='compiled')", *notes)
        if self.nanoseconds is not None:
            notes = ("times were of another shape and are left out: gtflops.measure_time(profile, device)", *notes)
        if isinstance(step, Interpolated):
            unbuilt = _Unbuilt.of(step, notes, self.versions, self._shapes, sizes)
            if unbuilt is not None:
                return unbuilt
        return replace(Profile.from_graph(step.graph, notes, self.versions), _shapes=self._shapes, _sizes=sizes)

    # --- files --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data, versioned, with a digest of all the rest."""
        content = {
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "unsupported": [[op.name, op.count, list(op.where)] for op in self.unsupported],
            "graph": self.graph.to_json(),
            "matmul": self.prices[0].tolist(),
            "other": self.prices[1].tolist(),
            "compiled": None if self.compiled is None else self.compiled.to_json(),
            "nanoseconds": None if self.nanoseconds is None else self.nanoseconds.tolist(),
            "named": self._named_to_json(),
        }
        return {"format": FORMAT, "version": FORMAT_VERSION, "digest": _digest(content), **content}

    def _named_to_json(self) -> dict[str, Any] | None:
        """What is needed to trace an architecture again at other sizes; none of it for a model of the user's."""
        source = None if self._shapes is None else self._shapes.source
        if not isinstance(source, Named) or source.loss is not None:
            return None
        return source.to_json(self._sizes or source.sizes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_json(), allow_nan=False, separators=(",", ":")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what :meth:`save` wrote; needs no torch and executes nothing.

        SavedFileError where the file is no profile, damaged, or of another version of the format; InputError where
        there is no file.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}; expected a file written by profile.save"
            ) from error
        except UnicodeDecodeError as error:
            raise SavedFileError(f"{path} is no text, expected a profile written by profile.save") from error
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SavedFileError(
                f"{path} is not whole JSON ({error}): it was cut off or is no profile; profile the model again"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise SavedFileError(f"{path} is no gtflops profile, expected a file written by profile.save")
        if data.get("version") != FORMAT_VERSION:
            raise SavedFileError(
                f"{path} has version {data.get('version')!r} of the profile format, this gtflops reads version "
                f"{FORMAT_VERSION}; profile the model again"
            )
        content = {key: value for key, value in data.items() if key not in ("format", "version", "digest")}
        try:
            if data["digest"] != _digest(content):
                raise ValueError("its digest is another")
            graph = Graph.from_json(data["graph"])
            prices = _columns(graph, data["matmul"], data["other"])
            unsupported = tuple(
                UnsupportedOperator(name, count, tuple(where)) for name, count, where in data["unsupported"]
            )
            notes = tuple(data["notes"])
            shapes = None
            if (named := data["named"]) is not None:
                source = Named.from_json(named)
                of_the_shape = (f"{source.sizes}: ", TIMED)
                of_the_model = tuple(note for note in notes if not note.startswith(of_the_shape))
                shapes = Shapes(source, Traced(graph, of_the_model))
            compiled = None if data["compiled"] is None else CompiledStep.from_json(data["compiled"])
            nanoseconds = None if data["nanoseconds"] is None else times_of_nodes(graph, data["nanoseconds"])
            return cls(graph, prices, unsupported, notes, dict(data["versions"]), compiled, nanoseconds, _shapes=shapes)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise SavedFileError(
                f"{path} is damaged ({type(error).__name__}: {error}); profile the model again"
            ) from error

    def verify(
        self,
        model: "torch.nn.Module",
        batch: Any,
        loss: "Loss | None" = None,
        *,
        selections: int | Iterable[Iterable[str]] = 5,
        seed: int = 0,
    ) -> "Verification":
        """Run real steps of the model that was profiled, and compare what they execute with what is predicted.

        ``selections`` are lists of names, or how many to draw besides none, all, first and last in backward order; each
        costs one forward and backward pass, on whatever device the model is (meta tensors compute nothing). PyTorch's
        ``FlopCounterMode`` counts the same steps, and fvcore the forward pass. The model is left as it was. InputError
        where model or selections do not fit.

        >>> import gtflops, torch
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)), torch.ones(7, 3)
        >>> profile = gtflops.profile(model, x, loss=lambda y, x: y.sum())
        >>> profile.verify(model, x, loss=lambda y, x: y.sum()).exact
        True
        """
        from gtflops.verification import verify

        return verify(self, model, batch, loss, selections, seed)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        selection: "Selection | None" = None,
        log: "TrainingLog | None" = None,
        importance: Mapping[str, float] | None = None,
    ) -> None:
        """Write a report by the suffix of ``path``: .html (one self-contained file), .md, .json or .csv.

        It says what a step costs and where, what each budget buys, and, where they are given, what ``selection`` trains
        and how the training of ``log`` went. What a budget buys is by ``importance``, else by the selection's, else by
        number of elements. A file that is there is replaced, whole. InputError for another suffix, a folder that cannot
        be written, or what is of another profile.

        >>> import gtflops, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "opt.csv")
        >>> gtflops.profile("facebook/opt-125m", batch_size=1, seq_len=8).report(path)
        >>> path.read_text().split(",")[:4]
        ['name', 'module', 'shape', 'numel']
        """
        from gtflops.report import write

        write(Path(path), self, selection, log, importance)

    def plot(self) -> "Figure":
        """Cost over depth as a matplotlib Figure (``pip install 'gtflops[plot]'``): t_dw, t_dy and its sum, FLOPs.

        >>> import gtflops
        >>> figure = gtflops.profile("facebook/opt-125m", batch_size=1, seq_len=8).plot()
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['t_dw (FLOP)', 't_dy (FLOP)', 'sum of t_dy (FLOP)']
        """
        from gtflops.report.plot import cost_over_depth

        return cost_over_depth(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gtflops.report.notebook import profile_html

        return profile_html(self)


#: Of what a profile has cached, what does not depend on the sizes of the batch.
_OF_ALL_SIZES = ("names", "needed_by", "_parameters", "_in_forward", "_position", "_uses", "_sums")


class _Unbuilt(Profile):
    """A profile of which the costs are known: its graph, and the price of each node, are made when they are asked for.

    A copy has both, and is as any other profile.
    """

    _step: Interpolated
    _tariff: Tariff

    @classmethod
    def of(
        cls, step: Interpolated, notes: Iterable[str], versions: Mapping[str, str], shapes: Shapes, sizes: Sizes
    ) -> "_Unbuilt | None":
        """``None`` where the prices of the family, or these, are no polynomials."""
        like, tariff = _priced(step.family)
        if tariff is None or (costs := tariff.at(step.point)) is None:
            return None
        # The fields of a profile but for its graph and prices, and of what is cached all that comes from these two.
        unbuilt = object.__new__(cls)
        unbuilt.__dict__.update(
            unsupported=like.unsupported,
            notes=tuple(dict.fromkeys((*notes, *like.notes))),
            versions=dict(versions),
            compiled=None,
            nanoseconds=None,
            _shapes=shapes,
            _sizes=sizes,
            _step=step,
            _tariff=tariff,
            _forward=costs.forward,
            _segments=costs.segments,
            **{name: getattr(like, name) for name in _OF_ALL_SIZES},
        )
        return unbuilt

    @cached_property
    def graph(self) -> Graph:
        return self._step.graph

    @cached_property
    def prices(self) -> npt.NDArray[np.int64]:
        return self._tariff.prices_at(self._step.point)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return _priced(self._step.family)[0].blocks


def _priced(family: Family) -> tuple[Profile, Tariff | None]:
    """A profile of the family at one of its sizes, and its tariff; anew where the user's formulas are others by now."""
    registered = registrations()
    if family not in _PRICED or _PRICED[family][0] != registered:
        like = Profile.from_graph(family.template)
        _PRICED[family] = registered, like, Tariff.of(family, like.names, like.needed_by)
    return _PRICED[family][1:]


_PRICED: WeakKeyDictionary[Family, tuple[tuple[Entry, ...], Profile, Tariff | None]] = WeakKeyDictionary()


def _columns(graph: Graph, matmul: list[int], other: list[int]) -> npt.NDArray[np.int64]:
    """Prices as int64 [2, nodes], so that no sum of them overflows. ValueError where they do not fit the graph."""
    flops = [*matmul, *other]
    if not len(matmul) == len(other) == len(graph.nodes) or any(type(cost) is not int or cost < 0 for cost in flops):
        raise ValueError(f"{len(matmul)} and {len(other)} prices, expected a number of FLOPs for each node")
    total = sum(flops)
    if total > np.iinfo(np.int64).max:
        dearest = max(range(len(flops)), key=flops.__getitem__)
        node = graph.nodes[dearest % len(graph.nodes)]
        raise InputError(
            f"the step of {graph.model} costs {total:.3g} FLOP, more than 64 bits can hold ({flops[dearest]:.3g} of it "
            f"one {node.call.op} in {node.module or 'no submodule'}); expected a smaller batch: costs are "
            "proportional to its size"
        )
    prices = np.array([matmul, other], dtype=np.int64)
    prices.flags.writeable = False
    return prices


def times_of_nodes(graph: Graph, nanoseconds: list[int]) -> npt.NDArray[np.int64]:
    """Times as read-only int64 [nodes] of which no sum overflows. ValueError where they do not fit the graph."""
    if len(nanoseconds) != len(graph.nodes) or any(type(time) is not int or time < 0 for time in nanoseconds):
        raise ValueError(f"{len(nanoseconds)} times, expected a number of nanoseconds for each node")
    if sum(nanoseconds) > np.iinfo(np.int64).max:
        raise ValueError(f"a step of {sum(nanoseconds)} nanoseconds, more than 64 bits can hold")
    times = np.array(nanoseconds, dtype=np.int64)
    times.flags.writeable = False
    return times


def _checked(ops: Ops) -> Ops:
    if ops not in ("all", "matmul"):
        raise InputError(f"ops is {ops!r}, expected 'all' or 'matmul'")
    return ops


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def profile(
    model: "torch.nn.Module | str | os.PathLike[str]",
    batch: Any = None,
    loss: "Loss | None" = None,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    decoder_len: int | None = None,
    attention: Literal["eager", "sdpa"] = "eager",
    graph: Literal["eager", "compiled"] = "eager",
    uses: Uses | None = None,
) -> Profile:
    """What one training step of a model costs, for every choice of trainable tensors, from one trace.

    Either ``profile(model, batch, loss=None)`` with an ``nn.Module`` (real, fake or meta parameters) and a batch
    (a mapping of the forward's arguments, a tuple, or a tensor); ``loss(outputs, batch)`` gives a scalar tensor,
    ``outputs.loss`` without it. The model is left as it was, to the bit. Or ``profile(name, batch_size=,
    seq_len=)`` with a local folder, a preset or a Hugging Face id: only the architecture is built, without weights;
    ``decoder_len`` is the length of an encoder-decoder's labels, ``seq_len`` unless given; a classifier of images has
    none of both.

    ``graph="compiled"`` adds :attr:`Profile.compiled`: what ``torch.compile`` would run of the step, for the tensors
    of the model that require gradients now (all of them by name), to be held beside the eager prediction for the
    same tensors, ``profile.step_flops(profile.compiled.trainable)``.

    ``uses="separate"`` has a tensor for each use of one that several modules share: ``lm_head.weight`` beside
    ``model.embed_tokens.weight``, each with its own costs, so that it can be trained through its head alone. Adding up
    the gradients of several is counted.

    Raises InputError for arguments that do not fit, UnsupportedModelError where the model cannot be captured.

    >>> import gtflops
    >>> step = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128).step_flops("all", ops="matmul")
    >>> layer = 2 * 4 * 128 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * 2 * 4 * 128 * 128 * 768  # linear, attention
    >>> head = 2 * 4 * 128 * 768 * 50272
    >>> step.forward == 12 * layer + head, step.backward == 2 * step.forward
    (True, True)
    """
    # Capture is the one stage that needs torch, and a saved profile is read without it.
    import torch

    from gtflops.capture import architecture
    from gtflops.capture.uses import check_uses

    check_uses(uses)
    if graph not in ("eager", "compiled"):
        raise InputError(f"graph is {graph!r}, expected 'eager' or 'compiled'")
    if attention not in ("eager", "sdpa"):
        raise InputError(f"attention is {attention!r}, expected 'eager' or 'sdpa'")
    if uses is not None and graph == "compiled":
        raise InputError("graph='compiled' has shared tensors as a whole; expected it without uses='separate'")
    if loss is not None and not callable(loss):
        raise InputError(f"loss is {loss!r}, expected a function of (model outputs, batch) that gives a scalar tensor")
    source: Live | Named
    if isinstance(model, torch.nn.Module):
        if batch is None or any(size is not None for size in (batch_size, seq_len, decoder_len)):
            raise InputError("a model is profiled on a batch: expected profile(model, batch, loss=None)")
        if attention != "eager":
            raise InputError(
                "attention is chosen for models by name; a model has its own: model.set_attn_implementation"
            )
        source = Live(model, batch, loss, uses)
        traced = source.profiled()
    elif isinstance(model, (str, os.PathLike)):
        if batch is not None or batch_size is None:
            raise InputError("a model is profiled by name on sizes: expected profile(name, batch_size=4, seq_len=512)")
        name = os.fspath(model)
        built = architecture(name, batch_size=batch_size, seq_len=seq_len, decoder_len=decoder_len, attention=attention)
        source = Named(name, attention, loss, built.sizes, uses)
        traced = source.traced(built)
        model, batch = built.model, built.batch
    else:
        raise InputError(f"model is a {type(model).__name__}, expected a torch.nn.Module or a name")
    eager = Profile.from_graph(traced.graph, traced.notes, _versions())
    eager = replace(eager, _shapes=Shapes(source, traced))
    if graph == "eager":
        return eager
    from gtflops.capture.compiled import compiled_step  # dynamo and inductor take seconds to import

    compiled = compiled_step(model, batch, loss)
    return replace(eager, compiled=compiled, notes=(*eager.notes, *compiled.notes()))


@cache  # reading them takes longer than pricing a shape
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in ("gtflops", "torch", "transformers")}
