"""The graph of one step at any size of its batch: exact, from the graphs of a few sizes. No torch.

The integers in the graphs of one model, shapes above all, are polynomials of the batch size and of the lengths. A
:class:`Family` is fitted on traced graphs of one structure and gives the graph at other sizes; :class:`Shapes` decides
when such a family may answer and when the step has to be traced.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import combinations, count, pairwise, product, repeat
from typing import Any, Generic, Protocol, TypeVar

from gtflops.errors import GtflopsError, InputError
from gtflops.graph import Graph, Node
from gtflops.operators import Call
from gtflops.polynomials import Monomial, Polynomial, interpolated

T = TypeVar("T")

# Attention is quadratic in the lengths together, and a step linear in its batch.
_DEGREES = {"batch_size": 1, "seq_len": 2, "decoder_len": 2, "num_targets": 1}
_DEGREE_OF_LENGTHS = 2

# A head and a loss on chosen positions have rows, not lengths: this size is never multiplied with another, and no code
# asks for it, so that a family has it free from the start, and answers for all between the least and most traced.
_ALONE = "num_targets"

# The multiples that kernels and padding are made for.
_ALIGNMENTS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is variable in the shape of a batch; ``None`` where the batch has no such size.

    ``num_targets`` is at how many positions, of all its rows together, a trimmed batch has the head and the loss.

    >>> str(Sizes(batch_size=4, seq_len=512))
    'batch_size 4, seq_len 512'
    """

    batch_size: int
    seq_len: int | None = None
    decoder_len: int | None = None
    num_targets: int | None = None

    def items(self) -> tuple[tuple[str, int], ...]:
        """The sizes that there are, by name."""
        named = ((name, getattr(self, name)) for name in _DEGREES)
        return tuple((name, size) for name, size in named if size is not None)

    def changed(self, changes: Mapping[str, int | None]) -> "Sizes":
        """With the sizes that are given in the place of these. InputError for one that there is not, or is no size."""
        for name, size in changes.items():
            if size is None:
                continue
            if getattr(self, name) is None:
                raise InputError(f"{name} is {size!r}, but the batch that was profiled has none; it has {self}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{name} is {size!r}, expected a positive integer")
        return replace(self, **{name: size for name, size in changes.items() if size is not None})

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.items())


# --- a family of graphs -----------------------------------------------------------------------------------------


def basis(free: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Exponents of ``free`` in the monomials that an integer of a graph may be made of; a lower set, from 0."""
    lengths = [position for position, name in enumerate(free) if name not in ("batch_size", _ALONE)]
    alone = free.index(_ALONE) if _ALONE in free else None
    return tuple(
        exponents
        for exponents in product(*(range(_DEGREES[name] + 1) for name in free))
        if sum(exponents[position] for position in lengths) <= _DEGREE_OF_LENGTHS
        and (alone is None or not exponents[alone] or sum(exponents) == 1)
    )


def _monomials(free: Sequence[str]) -> list[Monomial]:
    """The monomials of that basis."""
    return [
        tuple(name for name, power in zip(free, exponents, strict=True) for _ in range(power))
        for exponents in basis(free)
    ]


def lattice(free: Sequence[str], nodes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """The points at which polynomials of that basis are determined by their values: one for each monomial.

    ``nodes`` has a size for each power of a variable. On a lower set of exponents the points with the same indices are
    unisolvent, whatever the nodes, as long as they are distinct.
    """
    return [
        {name: nodes[name][power] for name, power in zip(free, exponents, strict=True)} for exponents in basis(free)
    ]


class Family:
    """Graphs of one structure: the same operators, edges, phases, modules and arguments but for integers.

    ``graphs`` stand at the points of ``lattice(free, ...)``. Every integer of theirs becomes a polynomial of the free
    sizes, of which few are distinct. ``None`` from :meth:`fit` where the graphs differ by more than integers.
    """

    def __init__(
        self,
        points: Sequence[Mapping[str, int]],
        template: Graph,
        frame: "_Template[Graph]",
        calls: Sequence["_Template[Call]"],
        call_of: Sequence[int],
        integers: Sequence[int | Polynomial],
    ) -> None:
        self.points = points
        self.template = template
        self._frame = frame
        self._calls = calls
        self._call_of = call_of
        self._integers = integers
        self._broken = [value for value in integers if isinstance(value, Polynomial) and not value.is_whole]

    @classmethod
    def fit(cls, free: Sequence[str], points: Sequence[Mapping[str, int]], graphs: Sequence[Graph]) -> "Family | None":
        template = graphs[0]
        if any(not same_but_for_calls(template, graph) for graph in graphs[1:]):
            return None
        distinct: dict[tuple[int, ...], int] = {}
        values: dict[tuple[int, ...], int] = {}
        calls: list[_Template[Call]] = []
        call_of: list[int] = []
        for nodes in zip(*(graph.nodes for graph in graphs), strict=True):
            key = tuple(id(node.call) for node in nodes)  # equal calls of a graph are one object
            if key not in distinct:
                call = _Template.of([node.call for node in nodes], values)
                if call is None:
                    return None
                distinct[key] = len(calls)
                calls.append(call)
            call_of.append(distinct[key])
        frame = _Template.of([replace(graph, nodes=()) for graph in graphs], values)
        if frame is None:
            return None
        return cls(points, template, frame, calls, call_of, interpolated(_monomials(free), points, values))

    def has(self, point: Mapping[str, int]) -> bool:
        """Whether there is a graph at these sizes: where a polynomial has no integer value, it cannot be right."""
        return all(type(value.at(point)) is int for value in self._broken)

    def at(self, point: Mapping[str, int]) -> Graph | None:
        """The graph at other sizes; ``None`` where there is none."""
        if not self.has(point):
            return None
        values = [value.at(point) if isinstance(value, Polynomial) else value for value in self._integers]
        shared: dict[Call, Call] = {}
        return self._with(values, [shared.setdefault(call, call) for call in self._calls_with(values)])

    @cached_property
    def general(self) -> Graph:
        """The graph at all sizes at once: with polynomials of them in the place of integers, for formulas to run on."""
        return self._with(self._integers, self._calls_with(self._integers))

    def _calls_with(self, values: Sequence[Any]) -> list[Call]:
        return [template.at(values) for template in self._calls]

    def _with(self, values: Sequence[Any], calls: Sequence[Call]) -> Graph:
        nodes = tuple(
            Node(*before, calls[call], *after)  # type: ignore[call-arg]  # in the order of its fields
            for (before, after), call in zip(self._around_calls, self._call_of, strict=True)
        )
        return replace(self._frame.at(values), nodes=nodes)

    @cached_property
    def _around_calls(self) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """The fields of each node before and after its call."""
        names = [field.name for field in fields(Node)]
        position = names.index("call")
        return [
            (
                tuple(getattr(node, name) for name in names[:position]),
                tuple(getattr(node, name) for name in names[position + 1 :]),
            )
            for node in self.template.nodes
        ]


@dataclass(frozen=True, slots=True)
class _Template(Generic[T]):
    """A value whose integers are to be put in; ``slots`` are the polynomials that they are, in their order."""

    value: T
    slots: tuple[int, ...]
    varies: bool

    @classmethod
    def of(cls, samples: Sequence[T], values: dict[tuple[int, ...], int]) -> "_Template[T] | None":
        """From the same value at each point of a lattice; adds the distinct tuples of integers to ``values``."""
        integers = [tuple(_integers(sample)) for sample in samples]
        structure = _with_integers(samples[0], repeat(0))
        for sample, those in zip(samples[1:], integers[1:], strict=True):
            if len(those) != len(integers[0]) or _with_integers(sample, repeat(0)) != structure:
                return None
        columns = list(zip(*integers, strict=True))
        varies = any(len(set(column)) > 1 for column in columns)
        return cls(samples[0], tuple(values.setdefault(column, len(values)) for column in columns), varies)

    def at(self, values: Sequence[Any]) -> T:
        return _with_integers(self.value, (values[slot] for slot in self.slots)) if self.varies else self.value


def _integers(value: Any) -> Iterator[int]:
    """The integers in a record, in order of its fields; a bool is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, Mapping):
        yield from _integers(tuple(value.values()))
    elif is_dataclass(value):
        for field in fields(value):
            yield from _integers(getattr(value, field.name))


def _with_integers(value: T, integers: Iterator[Any]) -> T:
    """The same record with other integers, in the order of :func:`_integers`."""
    return _replaced(value, integers)  # type: ignore[no-any-return]


def _replaced(value: Any, integers: Iterator[Any]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return next(integers)
    if isinstance(value, tuple):
        return tuple(_replaced(item, integers) for item in value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, integers) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_replaced(getattr(value, field.name), integers) for field in fields(value)))
    return value


def same_but_for_calls(one: Graph, other: Graph) -> bool:
    """Whether the nodes of two graphs are the same operators with the same edges, in the same phases and modules."""
    names = [field.name for field in fields(Node) if field.name != "call"]
    return len(one.nodes) == len(other.nodes) and all(
        a.call.op == b.call.op and all(getattr(a, name) == getattr(b, name) for name in names)
        for a, b in zip(one.nodes, other.nodes, strict=True)
    )


# --- when to trace, when to interpolate -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traced:
    """A step as it was captured at some sizes, and what was assumed."""

    graph: Graph
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A step inside of what was traced: the one that ``family`` has at ``point``."""

    family: Family
    point: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def graph(self) -> Graph:
        graph = self.family.at(self.point)
        assert graph is not None
        return graph


class Source(Protocol):
    """What a profile was made from, and can be traced again."""

    @property
    def sizes(self) -> Sizes:
        """Those of the batch that was profiled."""

    def trace(self, sizes: Sizes) -> Traced:
        """The step at these sizes."""


@dataclass(frozen=True, slots=True)
class _Region:
    """Sizes at which a family answers: between the least and the largest traced, and special only in ways that were
    traced."""

    low: dict[str, int]
    high: dict[str, int]
    special: frozenset[tuple[str, str | int]]

    @classmethod
    def of(cls, traced: Sequence[Sizes]) -> "_Region":
        items = [dict(sizes.items()) for sizes in traced]
        return cls(
            {name: min(item[name] for item in items) for name in items[0]},
            {name: max(item[name] for item in items) for name in items[0]},
            frozenset[tuple[str, str | int]]().union(*map(_special, traced)),
        )

    def __contains__(self, sizes: Sizes) -> bool:
        inside = all(self.low[name] <= size <= self.high[name] for name, size in sizes.items())
        return inside and _special(sizes) <= self.special

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {low} to {self.high[name]}" if low < self.high[name] else f"{name} {low}"
            for name, low in self.low.items()
        )


def _special(sizes: Sizes) -> frozenset[tuple[str, str | int]]:
    """Why code may treat sizes in its own way: which are equal, and the powers of two that they are multiples of.

    An encoder and a decoder of one length may share a mask; kernels and padding have paths for aligned lengths.
    """
    items = [(name, size) for name, size in sizes.items() if name != _ALONE]
    equal = ((a, b) for (a, size), (b, other) in combinations(items, 2) if size == other)
    aligned = ((name, power) for name, size in items for power in _ALIGNMENTS if size % power == 0)
    return frozenset((*equal, *aligned))


@dataclass(slots=True)
class _Fitted:
    family: Family
    free: tuple[str, ...]
    traced: list[Sizes]
    region: _Region

    def applies(self, sizes: Sizes) -> bool:
        """Whether sizes that are not free are those of the family, and no free one is 1, which PyTorch treats in its
        own way (broadcasting, folding of products)."""
        return all(size > 1 if name in self.free else size == self.region.low[name] for name, size in sizes.items())

    def has(self, sizes: Sizes) -> bool:
        """Whether the family answers for these sizes by itself."""
        return sizes in self.region and self.applies(sizes) and self.family.has(dict(sizes.items()))

    def grow(self, sizes: Sizes, graph: Graph) -> bool:
        """Takes traced sizes into the region, if the family has that graph there."""
        if sizes in self.traced:
            return True
        if not self.applies(sizes) or self.family.at(dict(sizes.items())) != graph:
            return False
        self.traced.append(sizes)
        self.region = _Region.of(self.traced)
        return True


class Shapes:
    """The step of one profile at other sizes.

    The first other shape is traced. From the second on, in the same sizes, a family is fitted: the few traces that are
    missing are made, and one more to check it; inside of what was traced it then answers by itself. Outside, the step
    is traced, which widens the region where it agrees. Where the graph itself changes with the shape, each shape is
    traced.
    """

    def __init__(self, source: Source, origin: Traced) -> None:
        self._source = source
        self._origin = origin
        self._families: list[_Fitted] = []
        self._waiting: dict[_Pins, dict[Sizes, Graph]] = {}
        self._changing: set[_Pins] = set()
        self._is_unchanged = False

    @property
    def source(self) -> Source:
        """What is traced."""
        return self._source

    @property
    def sizes(self) -> Sizes:
        """Sizes of the batch that was profiled. InputError where they cannot be told."""
        return self._source.sizes

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a profile, in another process above all, has no model: it has none of this."""
        return type(None), ()

    def at(self, sizes: Sizes) -> Traced | Interpolated:
        """The step at these sizes, with a note of how it was obtained.

        InputError where the model refuses them, or is no longer the one that was profiled.
        """
        if sizes == self.sizes:
            return self._origin
        for fitted in self._families:
            if fitted.has(sizes):
                how = f"interpolated, exactly, from {len(fitted.traced)} traces at {fitted.region}"
                return Interpolated(fitted.family, dict(sizes.items()), (*self._origin.notes, f"{sizes}: {how}"))
        pins = self._pins(sizes)
        if sizes in self._waiting.get(pins, {}):
            return Traced(self._waiting[pins][sizes], (*self._origin.notes, f"{sizes}: traced"))
        traced = self._trace(sizes)
        grown = [fitted.grow(sizes, traced.graph) for fitted in self._families if fitted.applies(sizes)]
        changes = pins in self._changing
        if not changes and not any(grown):
            changes = not all(grown) or not self._learn(pins, sizes, traced.graph)
        how = "traced, as the step itself changes with the shape" if changes else "traced"
        return Traced(traced.graph, (*traced.notes, f"{sizes}: {how}"))

    def _trace(self, sizes: Sizes) -> Traced:
        traced = self._source.trace(sizes)
        if not same_but_for_calls(traced.graph, self._origin.graph) and not self._is_unchanged:
            # By the shape, or because the model or its settings are others than when it was profiled?
            self._is_unchanged = self._source.trace(self.sizes).graph == self._origin.graph
            if not self._is_unchanged:
                raise InputError(
                    f"the {self._origin.graph.model} is no longer the model that was profiled, or is traced under "
                    "other settings (autocast, attention, adapters): at the profiled shape it gives another graph; "
                    "profile it again"
                )
        return traced

    def _pins(self, sizes: Sizes) -> "_Pins":
        origin = dict(self.sizes.items())
        return frozenset(
            (name, size) for name, size in sizes.items() if size == 1 or (size == origin[name] and name != _ALONE)
        )

    def _learn(self, pins: "_Pins", sizes: Sizes, graph: Graph) -> bool:
        """Fits a family that varies all sizes but the pinned ones, from the second shape on. False if there is none."""
        free = tuple(name for name, _ in sizes.items() if name not in dict(pins))
        known = self._waiting.setdefault(pins, {})
        known[sizes] = graph
        if not free or len(known) < 2:
            return True
        del self._waiting[pins]
        fitted = self._fit(pins, free, known)
        if fitted is None:
            self._changing.add(pins)
            return False
        self._families.append(fitted)
        return True

    def _fit(self, pins: "_Pins", free: tuple[str, ...], known: dict[Sizes, Graph]) -> _Fitted | None:
        """From the shapes that are known and a few more; where one that was asked for is special in some way, such as
        the greatest length of a model, from others in between alone."""
        origin = dict(self.sizes.items())
        if all(origin[name] == size for name, size in pins) and all(origin[name] > 1 for name in free):
            known = {self.sizes: self._origin.graph, **known}
        between = {name: sorted({origin[name], *(dict(sizes.items())[name] for sizes in known)} - {1}) for name in free}
        fitted = self._fit_through(pins, free, between, known) or self._fit_through(pins, free, between, {})
        if fitted is not None:
            for sizes, graph in known.items():
                fitted.grow(sizes, graph)
        return fitted

    def _fit_through(
        self, pins: "_Pins", free: tuple[str, ...], between: Mapping[str, list[int]], known: Mapping[Sizes, Graph]
    ) -> _Fitted | None:
        """From ``known`` graphs, as far as they stand at the points of a lattice, and traces at its others."""
        taken = {size for sizes in between.values() for size in sizes}

        def another(name: str, nodes: Sequence[int]) -> int:
            size = _size_beside(sorted({*between[name], *nodes}), taken)
            taken.add(size)
            return size

        nodes: dict[str, list[int]] = {}
        for name in free:
            asked = dict.fromkeys(dict(sizes.items())[name] for sizes in known)
            nodes[name] = [size for size in asked if size > 1][: _DEGREES[name] + 1]
            while len(nodes[name]) <= _DEGREES[name]:
                nodes[name].append(another(name, nodes[name]))
        points = lattice(free, nodes)
        points.append({name: another(name, nodes[name]) for name in free})  # the check
        lattice_sizes = [Sizes(**dict(pins), **point) for point in points]
        graphs: dict[Sizes, Graph] = {}
        before: Graph | None = None
        for sizes in (*known, *lattice_sizes):
            if sizes in graphs:
                continue
            try:
                graph = known[sizes] if sizes in known else self._source.trace(sizes).graph
            except GtflopsError:
                return None  # nobody asked for this shape: it may be none of the model's
            if before is not None and not same_but_for_calls(before, graph):
                return None
            graphs[sizes] = before = graph
        *determined, check = (graphs[sizes] for sizes in lattice_sizes)
        family = Family.fit(free, points[:-1], determined)
        if family is None or family.at(points[-1]) != check:
            return None
        return _Fitted(family, free, lattice_sizes, _Region.of(lattice_sizes))


_Pins = frozenset[tuple[str, int]]


def _size_beside(nodes: Sequence[int], taken: set[int]) -> int:
    """A size of which nothing is special: not 1, not ``taken`` and, inside of the range of ``nodes``, odd."""
    return next(size for size in _sizes_beside(sorted(nodes)) if size not in taken)


def _sizes_beside(nodes: Sequence[int]) -> Iterator[int]:
    for low, high in sorted(pairwise(nodes), key=lambda gap: gap[0] - gap[1]):
        middle = (low + high) // 2 | 1
        yield from (
            size for offset in range(0, 8, 2) for size in (middle - offset, middle + offset) if low < size < high
        )
    for low, high in pairwise(nodes):
        yield from range(low + 1, min(high, low + 8))
    yield from range(nodes[0] - 1, 1, -1)  # rather below than above, which may be beyond a model's positions
    yield from count(nodes[-1] + 1)
