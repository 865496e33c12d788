"""What torch.compile would run of one training step, priced. Immutable, serialisable, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from gtflops.operators import Flops

#: When an operator runs; ``recompute`` is a forward operator that the backward pass runs a second time.
Part: TypeAlias = Literal["forward", "backward", "recompute"]


@dataclass(frozen=True, slots=True)
class CompiledOperator:
    """All calls of one operator in one part of a compiled step; ``flops`` is ``None`` where it has no price."""

    part: Part
    name: str
    count: int
    flops: Flops | None


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """FLOPs of a training step under ``torch.compile``, for the tensors ``trainable``.

    The operators are those of AOTAutograd's forward and backward graphs, after inductor's decompositions and its
    min-cut partitioner, before any fusion. ``graphs`` says how many forward graphs ran (one that ran twice counts
    twice), ``graph_breaks`` why there are several, and ``outside`` what ran eagerly between them, which the operators
    include.

    >>> import gtflops, torch
    >>> model = torch.nn.Linear(3, 5, bias=False)
    >>> profile = gtflops.profile(model, torch.ones(7, 3), loss=lambda y, x: y.sum(), graph="compiled")
    >>> profile.compiled.forward.matmul, profile.compiled.backward.matmul    # 2 * 7 * 3 * 5 each
    (210, 210)
    >>> profile.compiled.graphs, profile.compiled.recompute
    (1, Flops(matmul=0, other=0))
    """

    trainable: tuple[str, ...]
    operators: tuple[CompiledOperator, ...]
    outside: Flops
    graphs: int
    graph_breaks: tuple[str, ...]

    @property
    def forward(self) -> Flops:
        """The forward graphs, loss included."""
        return self._sum("forward")

    @property
    def backward(self) -> Flops:
        """The backward graphs, without what they recompute."""
        return self._sum("backward")

    @property
    def recompute(self) -> Flops:
        """Forward operators that the backward pass runs again."""
        return self._sum("recompute")

    @property
    def total(self) -> int:
        """FLOPs of the step, both columns."""
        return sum(sum(part) for part in (self.forward, self.backward, self.recompute))

    @property
    def unsupported(self) -> dict[str, int]:
        """Operators without a price, which the sums leave out, and how often they ran."""
        counts: dict[str, int] = {}
        for row in self.operators:
            if row.flops is None:
                counts[row.name] = counts.get(row.name, 0) + row.count
        return counts

    def _sum(self, part: Part) -> Flops:
        priced = [row.flops for row in self.operators if row.part == part and row.flops is not None]
        return Flops(sum(flops.matmul for flops in priced), sum(flops.other for flops in priced))

    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        if not self.graph_breaks:
            return ()
        outside = (
            f", and operators of {sum(self.outside):,} FLOP run eagerly outside of them" if any(self.outside) else ""
        )
        return (f"torch.compile breaks the step into {self.graphs} graphs{outside}: {'; '.join(self.graph_breaks)}",)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "trainable": list(self.trainable),
            "operators": [
                [row.part, row.name, row.count, None if row.flops is None else list(row.flops)]
                for row in self.operators
            ],
            "outside": list(self.outside),
            "graphs": self.graphs,
            "graph_breaks": list(self.graph_breaks),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CompiledStep":
        """The inverse of :meth:`to_json`. May raise any error of Python's on data that it did not write."""
        operators = []
        for part, name, count, flops in data["operators"]:
            if part not in get_args(Part):
                raise ValueError(f"{part!r} is no part of a step")
            operators.append(CompiledOperator(part, str(name), int(count), None if flops is None else _flops(flops)))
        return cls(
            trainable=tuple(str(name) for name in data["trainable"]),
            operators=tuple(operators),
            outside=_flops(data["outside"]),
            graphs=int(data["graphs"]),
            graph_breaks=tuple(str(reason) for reason in data["graph_breaks"]),
        )


def _flops(data: list[int]) -> Flops:
    matmul, other = data
    return Flops(int(matmul), int(other))
