"""Holding a profile against what PyTorch executes, and against other counters, on the user's own model."""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gtflops.capture import Loss, batch_types, call_model, loss_of, unchanged
from gtflops.capture.batches import with_tensors_replaced
from gtflops.capture.dispatch import OperatorMode, describe_call
from gtflops.capture.uses import named_tensors, standing_in, uses_of_shared
from gtflops.errors import InputError
from gtflops.graph import Uses
from gtflops.operators import TensorType, lookup, price_executed
from gtflops.profiling import Profile, StepFlops


@dataclass(frozen=True, slots=True)
class Difference:
    """An operator of which two counts differ: FLOPs by either."""

    operator: str
    predicted: int
    other: int


@dataclass(frozen=True, slots=True)
class Check:
    """One selection, as predicted and as a real step executed it (FLOPs).

    ``predicted`` and ``executed`` are both columns by gtflops' table, ``predicted_matmul`` and ``pytorch`` matrix
    products (``None`` where PyTorch's counter fails on the model); ``differences`` and ``pytorch_differences`` say by
    operator where they are not the same. ``unpriced`` are executed operators without a price, with their number.
    """

    selection: str
    tensors: int
    predicted: int
    executed: int
    predicted_matmul: int
    pytorch: int | None
    differences: tuple[Difference, ...]
    pytorch_differences: tuple[Difference, ...]
    unpriced: Mapping[str, int]

    @property
    def exact(self) -> bool:
        """Whether the step executed what was predicted, operator by operator."""
        return not (self.differences or self.unpriced)


@dataclass(frozen=True, slots=True)
class ForwardByFvcore:
    """fvcore's count of one forward pass: MACs x 2 of its matrix products and convolutions, and what it skipped.

    ``flops`` is ``None`` where it could not run, and ``problem`` says why.
    """

    flops: int | None
    skipped: Mapping[str, int]
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What :meth:`gtflops.Profile.verify` found."""

    checks: tuple[Check, ...]
    forward_matmul: int
    fvcore: ForwardByFvcore
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every selection executed what was predicted."""
        return all(check.exact for check in self.checks)

    def explanations(self) -> list[str]:
        """Each difference between two counts once, in words."""
        lines: dict[str, None] = {}
        for check in self.checks:
            for difference in check.differences:
                lines[
                    f"{check.selection}: {difference.operator}: predicted {difference.predicted:,}, "
                    f"executed {difference.other:,}"
                ] = None
            for operator, count in check.unpriced.items():
                lines[f"{operator} has no price, and ran {count} times"] = None
            if check.pytorch is None:
                lines["PyTorch's counter fails on this model"] = None
            for difference in check.pytorch_differences:
                entry = lookup(difference.operator)
                ours = "" if entry is None else f"; here it is {entry.text} ({entry.source})"
                reason = "no formula" if difference.other == 0 else "another formula"
                lines[f"{difference.operator}: PyTorch's counter has {reason} for it{ours}"] = None
        return list(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"exact": self.exact, **asdict(self), "explanations": self.explanations()}


def verify(
    profile: Profile, model: torch.nn.Module, batch: Any, loss: Loss | None = None, selections: Any = 5, seed: int = 0
) -> Verification:
    """Run real steps of ``model`` and compare them with ``profile``; see :meth:`gtflops.Profile.verify`."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model is {model!r}, expected the torch.nn.Module that was profiled")
    profile.require_fit(model)
    if batch_types(batch) != profile.graph.batch:
        raise InputError(
            f"the batch has {_types(batch_types(batch))}, the profile is of {_types(profile.graph.batch)}; expected a "
            "batch of the same shapes, or the profile of this one: profile.at(...) or gtflops.profile(model, batch)"
        )
    checks = tuple(
        _check(profile, model, batch, loss, label, names)
        for label, names in _selections(profile, selections, random.Random(seed))
    )
    return Verification(
        checks,
        profile.step_flops("none", ops="matmul").forward,
        count_forward_by_fvcore(model, batch),
        profile.notes,
    )


def _types(batch: Mapping[str, TensorType]) -> str:
    return ", ".join(f"{name}: {tensor.dtype} {list(tensor.shape)}" for name, tensor in batch.items()) or "no tensors"


def _selections(profile: Profile, selections: Any, draw: random.Random) -> Iterator[tuple[str, list[str]]]:
    if not isinstance(selections, int) or isinstance(selections, bool):
        if isinstance(selections, str) or not isinstance(selections, Iterable):
            raise InputError(f"selections is {selections!r}, expected a number of them or lists of names of tensors")
        for number, names in enumerate(selections, start=1):
            yield f"given {number}", [profile.names[index] for index in profile.mask(names).nonzero()[0]]
        return
    if selections < 0:
        raise InputError(f"selections is {selections}, expected 0 or more")
    trainable = [tensor.name for tensor in profile.tensors if tensor.has_gradient]
    yield "none", []
    yield "all", trainable
    yield "first", trainable[:1]
    yield "last", trainable[-1:]
    for number in range(1, selections + 1):
        yield f"random {number}", draw.sample(trainable, draw.randint(1, len(trainable)))


def _check(
    profile: Profile, model: torch.nn.Module, batch: Any, loss: Loss | None, label: str, names: Collection[str]
) -> Check:
    def step() -> None:
        own = with_tensors_replaced(batch, lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad))
        if names or profile.graph.always:
            loss_of(call_model(model, own), own, loss).backward()
        else:
            outputs = call_model(model, own)
            if loss is not None:
                loss(outputs, own)

    executed = _Counting()
    try:
        with _training_only(model, names, profile), executed:
            step()
    except Exception as error:
        raise InputError(
            f"a real step of {type(model).__name__} failed: {type(error).__name__}: {error}; expected the model and "
            "the batch that were profiled"
        ) from error
    by_pytorch = _counted_by_pytorch(model, names, profile, step)
    predicted = _by_packet(profile.by_operator(names))
    predicted_matmul = _by_packet(profile.by_operator(names, ops="matmul"))
    return Check(
        selection=label,
        tensors=len(names),
        predicted=profile.step_flops(names).total,
        executed=sum(executed.by_operator.values()),
        predicted_matmul=profile.step_flops(names, ops="matmul").total,
        pytorch=None if by_pytorch is None else by_pytorch.total(),
        differences=_differences(predicted, executed.by_operator),
        pytorch_differences=() if by_pytorch is None else _differences(predicted_matmul, by_pytorch),
        unpriced=dict(executed.unpriced),
    )


def _counted_by_pytorch(
    model: torch.nn.Module, names: Collection[str], profile: Profile, step: Callable[[], None]
) -> Counter[str] | None:
    """FLOPs by operator of PyTorch's own counter, ``None`` where it fails: it tracks modules in ways of its own."""
    counter = FlopCounterMode(display=False)
    try:
        with _training_only(model, names, profile), counter:
            step()
    except Exception:
        return None
    return Counter({str(op): int(flops) for op, flops in counter.get_flop_counts().get("Global", {}).items()})


def _by_packet(steps: Mapping[str, StepFlops]) -> Counter[str]:
    """FLOPs by operator without overload, in place or not."""
    totals: Counter[str] = Counter()
    for op, step in steps.items():
        totals[_packet(op)] += step.total
    return totals


def _packet(op: str) -> str:
    return ".".join(op.split(".")[:2]).removesuffix("_")


# PyTorch runs one or the other, at the same FLOPs, by whether a tensor requires a gradient.
_TWINS = (("aten.mm", "aten.bmm"), ("aten._embedding_bag", "aten._embedding_bag_forward_only"))


def _differences(predicted: Counter[str], other: Counter[str]) -> tuple[Difference, ...]:
    equal = {op for twins in _TWINS if _sum(predicted, twins) == _sum(other, twins) for op in twins}
    found = (Difference(op, predicted[op], other[op]) for op in sorted((predicted.keys() | other.keys()) - equal))
    return tuple(difference for difference in found if difference.predicted != difference.other)


def _sum(counts: Counter[str], ops: Iterable[str]) -> int:
    return sum(counts[op] for op in ops)


class _Counting(OperatorMode):
    """FLOPs of what runs, by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_operator: Counter[str] = Counter()
        self.unpriced: Counter[str] = Counter()

    def observe(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        call = describe_call(func, args, kwargs, result)
        cost = price_executed(call)
        if cost is None:
            self.unpriced[call.op] += 1
            return
        self.by_operator[_packet(call.op)] += sum(cost)


@contextmanager
def _training_only(model: torch.nn.Module, names: Collection[str], profile: Profile | None = None) -> Iterator[None]:
    """Real steps inside see parameters that require gradients as said, and leave the model as it was. Names are those
    of ``profile``, or else of the model."""
    uses: Uses | None = "separate" if profile is not None and profile.graph.uses else None
    parameters = {
        name: torch.nn.Parameter(tensor.detach().clone(), requires_grad=name in names)  # some models write into them
        for name, tensor in named_tensors(model, uses).items()
    }
    for shared in uses_of_shared(model, uses):
        trained = [name for name in shared if name in names]
        for name in trained:
            parameters[name] = parameters[trained[0]]
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(standing_in(model, parameters, buffers, uses))
        yield


_PRODUCTS = ("addmm", "bmm", "conv", "einsum", "linear", "matmul")


def count_forward_by_fvcore(model: torch.nn.Module, batch: Any) -> ForwardByFvcore:
    """Matrix products of a forward pass, by a counter that shares no code with gtflops or torch's own."""
    from fvcore.nn import FlopCountAnalysis

    # Labels bring in the loss, which fvcore does not count, and code that torch.jit.trace cannot follow.
    given = {key: value for key, value in batch.items() if key != "labels"} if isinstance(batch, Mapping) else None
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)} if given else {}
    others = {key: value for key, value in given.items() if key not in tensors} if given else {}

    class Outputs(torch.nn.Module):
        """The model with positional arguments and tensors as outputs, which is what fvcore can trace."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            if given is None:
                return model(*inputs)
            outputs = model(**dict(zip(tensors, inputs, strict=True)), **others)
            return outputs.logits if hasattr(outputs, "logits") else outputs

    inputs = tuple(tensors.values()) if given is not None else (batch if isinstance(batch, (tuple, list)) else (batch,))
    with warnings.catch_warnings(), _training_only(model, ()), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of every Python number
        try:
            analysis = FlopCountAnalysis(Outputs(), tuple(inputs))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts = analysis.by_operator()  # layer norm and the like are counted too, by elements
            skipped = {op: int(number) for op, number in analysis.unsupported_ops().items()}
        except Exception as error:  # whatever torch.jit.trace makes of a model
            return ForwardByFvcore(None, {}, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return ForwardByFvcore(2 * sum(int(counts[product]) for product in _PRODUCTS), skipped, "")
