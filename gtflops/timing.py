"""What operators take on a device: each distinct call of a profile, run there on arguments of its types."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from gtflops.closure import AFTER_FORWARD
from gtflops.errors import InputError, UnsupportedOperatorError
from gtflops.graph import GETITEM, Phase
from gtflops.operators import Argument, Call, TensorType
from gtflops.profiling import TIMED, Profile, times_of_nodes

_ROUNDS = 3
_ROUND = 2_000_000  # ns; short operators run as often as fits in
_LONG = 250_000_000  # ns; what takes longer runs once after its warm-up


def measure_time(
    profile: Profile, device: "str | torch.device" = "cpu", *, allow_unsupported: bool = False
) -> Profile:
    """The same profile with times: what each operator takes on ``device``, in nanoseconds, measured by running it.

    Each distinct call, which is an operator with its shapes, dtypes and plain arguments, runs once to warm up and then
    until its time is known; nodes of equal calls share the price. No weights are needed, and a profile read from a
    file will do. :meth:`gtflops.Profile.step_seconds` sums them up for a selection.

    What a time holds: the shortest of a few rounds, with what PyTorch takes to dispatch the operator, views included.
    What it does not: Python and autograd between operators, other work on the machine, caches that are colder in a
    step than in a round, strides (arguments are contiguous), the values of a real batch (floating-point arguments are
    uniform in [0, 1), indices valid). An operator that makes several gradients runs for all of them.

    It takes about as long as the warm-up and three steps, less what repeats, and the memory of the largest operator's
    arguments and outputs. Random number generators are left as they were.

    Raises InputError for a device that is not there, UnsupportedOperatorError where operators cannot run from their
    types alone, with their reasons (``allow_unsupported=True`` counts them as 0 and names them in ``notes``).

    >>> import gtflops, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    >>> profile = gtflops.profile(model, torch.ones(7, 3), loss=lambda y, x: y.sum())
    >>> timed = gtflops.measure_time(profile, "cpu")
    >>> timed.step_seconds("all") > timed.step_seconds(["1.weight"]) > timed.step_seconds("none") > 0
    True
    """
    if not isinstance(profile, Profile):
        raise InputError(f"profile is a {type(profile).__name__}, expected what gtflops.profile returns")
    where = _device(device)
    runs = [node.call for node in profile.graph.nodes if node.phase in _STEP and node.call.op != GETITEM]
    times, failures = _times(dict.fromkeys(runs), where)
    if failures and not allow_unsupported:
        raise UnsupportedOperatorError(
            f"operators that do not run on {where} from their shapes alone: {_listed(failures)}; their time is unknown, "
            "so a budget would not hold. allow_unsupported=True counts them as 0"
        )
    note = f"{TIMED}on {_described(where)}: {len(times)} distinct calls of {len(runs)}"
    if failures:
        note += f"; 0 for want of a time: {_listed(failures)}"
    nanoseconds = [times.get(node.call, 0) if node.phase in _STEP else 0 for node in profile.graph.nodes]
    return replace(
        profile,
        nanoseconds=times_of_nodes(profile.graph, nanoseconds),
        notes=(*(before for before in profile.notes if not before.startswith(TIMED)), note),
    )


_STEP = (Phase.FORWARD, *AFTER_FORWARD)


def _device(device: "str | torch.device") -> torch.device:
    """The device as torch knows it. InputError unless it is there and computes."""
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}, expected one of {', '.join(there)}") from error
    if found.type != "cpu" and found.index is None and f"{found.type}:0" in there:
        found = torch.device(found.type, torch.accelerator.current_device_index())
    if str(found) not in there:
        raise InputError(f"device is {str(device)!r}, expected one of {', '.join(there)}")
    return found


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{device} ({torch.get_device_module(device).get_device_name(device)}), torch {torch.__version__}"


def _listed(failures: dict[str, str]) -> str:
    return "; ".join(f"{op} ({reason})" for op, reason in sorted(failures.items()))


def _times(calls: Iterable[Call], device: torch.device) -> tuple[dict[Call, int], dict[str, str]]:
    """Nanoseconds of each call, and by operator why others could not run."""
    times: dict[Call, int] = {}
    failures: dict[str, str] = {}
    arguments = _Arguments(device)
    own = [] if device.type == "cpu" else [device]
    # Operators that draw random numbers take them from the generators of the user.
    with torch.no_grad(), torch.random.fork_rng(own, device_type="cuda" if not own else device.type):
        for call in calls:
            try:
                func = _resolved(call.op)
                args, kwargs = arguments.of(func, call)
                times[call] = _time(lambda: func(*args, **kwargs), device)
            except Exception as error:  # whatever an operator makes of arguments that do not suit it
                failures.setdefault(call.op, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    return times, failures


def _time(run: Callable[[], Any], device: torch.device) -> int:
    """Nanoseconds of a run, the shortest of a few rounds. In a round runs follow each other as they do in a step."""
    synchronize = (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize

    def round_of(count: int) -> int:
        start = time.perf_counter_ns()
        for _ in range(count):
            run()
        synchronize()
        return (time.perf_counter_ns() - start) // count

    round_of(1)
    first = round_of(1)
    if first > _LONG:
        return first
    count = max(1, _ROUND // max(first, 1))
    return max(1, min(first, *(round_of(count) for _ in range(_ROUNDS))))


def _resolved(op: str) -> torch._ops.OpOverload:
    """The operator that a call names. Profiles from files may name what is not there."""
    namespace, name, overload = op.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


# Rows of the table that indices are looked up in, which may be far more than the smallest size among the arguments.
_ROWS: dict[str, Callable[[Call], Argument]] = {
    "aten.embedding.default": lambda call: call.shape(0)[0],
    "aten.embedding_dense_backward.default": lambda call: call.args[2],
    "aten._embedding_bag.default": lambda call: call.shape(0)[0],
}


class _Arguments:
    """Makes arguments of calls on a device.

    Floating-point numbers are uniform in [0, 1), which is within the domain of nearly every operator; integers are
    below the smallest size among the arguments, so that they are valid as indices of whatever they index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def of(self, func: torch._ops.OpOverload, call: Call) -> tuple[list[Any], dict[str, Any]]:
        sizes = [size for tensor in call.tensors() for size in tensor.shape if size]
        bound = _ROWS[call.op](call) if call.op in _ROWS else min(sizes, default=1)
        names = [argument.name for argument in func._schema.arguments]
        args = [self._made(value, name, bound) for name, value in zip(names, call.args, strict=False)]
        return args, {name: self._made(value, name, bound) for name, value in call.kwargs}

    def _made(self, value: Argument, name: str, bound: int) -> Any:
        if isinstance(value, TensorType):
            return self._tensor(value, bound)
        if isinstance(value, tuple):
            return [self._made(item, name, bound) for item in value]
        if name == "device":
            return self._device
        if isinstance(value, str) and value.startswith("torch."):
            return getattr(torch, value.removeprefix("torch."))
        return value

    def _tensor(self, kind: TensorType, bound: int) -> torch.Tensor:
        dtype = getattr(torch, kind.dtype)
        if kind.is_floating:
            return torch.rand(kind.shape, generator=self._generator, device=self._device).to(dtype)
        below = 2 if dtype is torch.bool else bound
        return torch.randint(below, kind.shape, generator=self._generator, dtype=dtype, device=self._device)
