"""What operators take on a device: each distinct call of a profile, run there on arguments of its types."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gtflops.closure import AFTER_FORWARD
from gtflops.errors import InputError, UnsupportedOperatorError
from gtflops.graph import GETITEM, Graph, Phase
from gtflops.operators import Argument, Call, TensorType
from gtflops.profiling import TIMED, Profile, times_of_nodes

_ROUNDS = 3
_ROUND_NS = 2_000_000  # short operators run as often as fits in
_LONG_NS = 1_000_000_000  # what takes longer runs once after its warm-up

_STEP = (Phase.FORWARD, *AFTER_FORWARD)


def measure_time(profile: Profile, device: str | torch.device = "cpu", *, allow_unsupported: bool = False) -> Profile:
    """The same profile with times: the nanoseconds that each operator takes on ``device``, measured by running it.

    Each distinct call, which is an operator with its shapes, dtypes and plain arguments, runs by itself: once to warm
    up, then in a few rounds, of which the shortest counts; equal calls share the price. An operator with a mask of
    outputs runs for some of them too, so that each has a price. No weights are needed, and a profile that was read from
    a file will do. :meth:`gtflops.Profile.step_seconds` is the sum for a selection.

    In the times is what PyTorch takes to dispatch an operator, so that views cost something. Not in them is what
    Python and autograd do between operators, and how a step differs from an operator by itself: caches and memory that
    are colder, tensors that are not contiguous, values that are not uniform in [0, 1), indices that are scattered
    otherwise. On an accelerator rounds are long enough that launches overlap as in a step. Times of one machine say
    nothing about another, and shares of a full step hold better than seconds.

    A call of 2 ms or more runs five times, one of over a second twice, and a shorter one as often as fits into three
    rounds of 2 ms; masks of outputs multiply that by up to four. Arguments are drawn for each. OPT-125m took 18 s with
    1 x 16 tokens and 35 s with 2 x 256, on one core: 130 and 140 calls. Takes the memory of the largest call. Random
    number generators are left as they were.

    Raises InputError for a device that is not there, UnsupportedOperatorError where operators do not run on it from
    their types alone (``allow_unsupported=True`` counts them as 0 and names them in ``notes``).

    >>> import gtflops, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    >>> profile = gtflops.profile(model, torch.ones(7, 3), loss=lambda y, x: y.sum())
    >>> timed = gtflops.measure_time(profile, device="cpu")
    >>> timed.step_seconds("all") > timed.step_seconds(["1.weight"]) > timed.step_seconds("none") > 0
    True
    """
    if not isinstance(profile, Profile):
        raise InputError(f"profile is {profile!r}, expected what gtflops.profile returns")
    place = _device(device)
    runs = [node.call for node in profile.graph.nodes if node.phase in _STEP and node.call.op != GETITEM]
    times, failures = _times(dict.fromkeys(runs), place)
    listed = "; ".join(f"{op} ({reason})" for op, reason in sorted(failures.items()))
    if failures and not allow_unsupported:
        raise UnsupportedOperatorError(
            f"operators that do not run on {place} from their types alone: {listed}; their time is unknown, so a "
            "budget would not hold. allow_unsupported=True counts them as 0"
        )
    note = f"{TIMED}on {_described(place)}: {len(times)} distinct calls for {len(runs)} nodes"
    if failures:
        note += f"; counted as 0, since they do not run by themselves: {listed}"
    return replace(
        profile,
        nanoseconds=times_of_nodes(profile.graph, _by_node(profile.graph, times)),
        notes=(*(other for other in profile.notes if not other.startswith(TIMED)), note),
    )


class _Time(NamedTuple):
    """Nanoseconds of a call: of the operator, and what each output adds where a mask says which are made."""

    shared: int
    outputs: tuple[int, ...] = ()


def _by_node(graph: Graph, times: Mapping[Call, _Time]) -> list[int]:
    """A time for each node; outputs that have one of their own carry it on the nodes that pick them."""
    by_node = []
    for node in graph.nodes:
        nanoseconds = 0
        if node.call.op == GETITEM:
            (position,) = node.call.args
            made_by = times.get(graph.nodes[node.inputs[0]].call)
            if made_by is not None and made_by.outputs:
                assert isinstance(position, int)
                nanoseconds = made_by.outputs[position]
        elif node.call in times:
            nanoseconds = times[node.call].shared
        by_node.append(nanoseconds)
    return by_node


# --- the device ---------------------------------------------------------------------------------------------------


def _device(device: str | torch.device) -> torch.device:
    """The device with its index. InputError unless it is there and computes."""
    there = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}, expected one of {', '.join(there)}") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if accelerator is not None and found == torch.device(accelerator.type):
        found = torch.device(accelerator.type, torch.accelerator.current_device_index())
    if str(found) not in there:
        raise InputError(f"device is {str(device)!r}, expected one of {', '.join(there)}")
    return found


def _described(device: torch.device) -> str:
    threads = torch.get_num_threads()
    name = "" if device.type == "cpu" else f" ({torch.get_device_module(device).get_device_name(device)})"
    return f"{device}{name}, {threads} {'thread' if threads == 1 else 'threads'}, torch {torch.__version__}"


# --- running ------------------------------------------------------------------------------------------------------


def _times(calls: Iterable[Call], device: torch.device) -> tuple[dict[Call, _Time], dict[str, str]]:
    """The time of each call, and by operator why it could not run."""
    times: dict[Call, _Time] = {}
    failures: dict[str, str] = {}
    arguments = _Arguments(device)
    # Some kernels keep what a backward will read only where gradients are enabled; no argument requires one. Operators
    # that draw random numbers take them from the user's generators.
    with torch.enable_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        for call in calls:
            try:
                times[call] = _time_of(call, arguments)
            except Exception as error:  # whatever an operator makes of arguments that do not suit it
                failures[call.op] = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:200]}"
    return times, failures


def _time_of(call: Call, arguments: "_Arguments") -> _Time:
    namespace, name, overload = call.op.split(".")
    func: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    args, kwargs = arguments.of(func, call)

    def measured(*args: Any) -> int:
        return _nanoseconds(lambda: func(*args, **kwargs), arguments.device)

    position = next((at for at, argument in enumerate(func._schema.arguments) if argument.name == "output_mask"), None)
    if position is None or position >= len(args) or sum(mask := args[position]) < 2:
        return _Time(measured(*args))

    def making(outputs: Collection[int]) -> int:
        return measured(*args[:position], [output in outputs for output in range(len(mask))], *args[position + 1 :])

    # Autograd asks for the first, which the layers below need, for the others, which are parameters', or for both.
    # These have their own times exactly; each of the others adds what it adds to those before it.
    asked = [output for output, is_asked in enumerate(mask) if is_asked]
    up_to = [making(asked[:end]) for end in range(1, len(asked) + 1)]
    outputs = [0] * len(mask)
    outputs[asked[0]] = min(max(0, up_to[-1] - making(asked[1:])), up_to[0] - 1)
    for output, before, after in zip(asked[1:], up_to[:-1], up_to[1:], strict=True):
        outputs[output] = max(0, after - before)
    return _Time(up_to[0] - outputs[asked[0]], tuple(outputs))


def _nanoseconds(run: Callable[[], Any], device: torch.device) -> int:
    """Of one run, the shortest average of a few rounds. Operators that work in place go on from what they left."""

    def average(count: int) -> int:
        _synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(count):
            run()
        _synchronize(device)
        return (time.perf_counter_ns() - start) // count

    average(1)
    first = max(1, average(1))
    if first > _LONG_NS:
        return first
    count = max(1, _ROUND_NS // first)
    return max(1, min(average(count) for _ in range(_ROUNDS)))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


# --- arguments ----------------------------------------------------------------------------------------------------


class _Arguments:
    """Makes the arguments of calls on a device.

    Floating-point numbers are uniform in [0, 1), which nearly every operator is defined on. Integers are below the
    smallest size among the arguments, so that they are valid indices of whatever they index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def of(self, func: torch._ops.OpOverload, call: Call) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments. ValueError where they cannot be made from the types."""
        op = call.op.rpartition(".")[0].removesuffix("_")
        sizes = (size for tensor in call.tensors() for size in tensor.shape if size)
        bound = _ROWS[op](call) if op in _ROWS else min(sizes, default=1)
        names = [argument.name for argument in func._schema.arguments]
        args = [self._made(value, names[at], bound) for at, value in enumerate(call.args)]
        kwargs = {name: self._made(value, name, bound) for name, value in call.kwargs}
        if op in _AGREED:
            _AGREED[op](call, args)
        elif state := _STATE & {names[at] for at, value in enumerate(call.args) if value is not None}:
            raise ValueError(f"{', '.join(sorted(state))} must be what a library left there")
        return args, kwargs

    def _made(self, value: Argument, name: str, bound: int) -> Any:
        if isinstance(value, TensorType):
            return self._tensor(value, bound)
        if isinstance(value, tuple):
            return [self._made(item, name, bound) for item in value]
        if name == "device":
            return self.device
        if name == "generator":
            return None
        if isinstance(value, str) and value.startswith("torch."):  # a dtype, layout or memory format
            return getattr(torch, value.removeprefix("torch."))
        return value

    def _tensor(self, kind: TensorType, bound: int) -> torch.Tensor:
        dtype = getattr(torch, kind.dtype)
        if kind.is_floating:
            drawn = torch.float32 if dtype.itemsize == 1 else dtype  # of 8 bits none can be drawn
            return torch.rand(kind.shape, dtype=drawn, generator=self._generator, device=self.device).to(dtype)
        below = 2 if dtype is torch.bool else min(bound, torch.iinfo(dtype).max)
        return torch.randint(below, kind.shape, dtype=dtype, generator=self._generator, device=self.device)


# Rows of the table that indices are looked up in; far more than the smallest size, and spread over more memory.
_ROWS: dict[str, Callable[[Call], int]] = {
    "aten.embedding": lambda call: call.shape(0)[0],
    "aten.embedding_dense_backward": lambda call: int(call.args[2]),  # type: ignore[arg-type]  # a number of rows
    "aten._embedding_bag": lambda call: call.shape(0)[0],
}

# Arguments that hold what another operator of a library left there. Made up, they can end the process.
_STATE = frozenset(("workspace", "reserve", "reserveSpace", "dropout_state"))


def _as_many_positions(call: Call, args: list[Any]) -> None:
    """Masks select as many positions as the traced ones did."""
    selected = call.output if call.op.startswith("aten.index.") else call.args[2]
    assert isinstance(selected, TensorType)
    for dim, mask in enumerate(args[1]):
        if mask is not None and mask.dtype is torch.bool and dim < len(selected.shape):
            mask.copy_((torch.arange(mask.numel()) < selected.shape[dim]).view(mask.shape))


def _bags_of_one_size(call: Call, args: list[Any]) -> None:
    """Offsets begin at 0 and do not descend."""
    bags = args[2].numel()
    args[2].copy_(torch.arange(bags) * args[1].numel() // bags)


def _groups_of_one_size(call: Call, args: list[Any]) -> None:
    """Groups end one after the other, the last with the rows (or columns, or the inner dimension)."""
    left, right = call.shape(0), call.shape(1)
    rows = right[1] if len(left) == 3 else left[0] if len(right) == 3 else left[1]
    if len(args) > 2 and args[2] is not None:
        groups = args[2].numel()
        args[2].copy_(torch.arange(1, groups + 1) * rows // groups)


def _workspace_of_forward(call: Call, args: list[Any]) -> None:
    """The backward of an RNN layer reads the workspace that its forward wrote."""
    reverse, mode, hidden_size, num_layers, has_biases, _, bidirectional, batch_sizes, batch_first = args[13:22]
    sizes = (reverse, batch_sizes, mode, hidden_size, num_layers, has_biases, bidirectional, batch_first)
    args[22] = torch.ops.aten.mkldnn_rnn_layer.default(*args[:7], *sizes, True)[3]


# Arguments of operators, without overload, whose values must agree with each other.
_AGREED: dict[str, Callable[[Call, list[Any]], None]] = {
    "aten.index": _as_many_positions,
    "aten.index_put": _as_many_positions,
    "aten._embedding_bag": _bags_of_one_size,
    "aten._grouped_mm": _groups_of_one_size,
    "aten.mkldnn_rnn_layer_backward": _workspace_of_forward,
}
