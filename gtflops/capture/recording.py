"""Writing down what runs, operator by operator."""

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from gtflops.capture.dispatch import OperatorMode, describe_call, outputs_of, tensor_type
from gtflops.capture.values import KnownValues
from gtflops.graph import GETITEM, Phase
from gtflops.operators import Call


class Origin(NamedTuple):
    """Where an operator comes from: the path of a module, and a line of code."""

    module: str
    source: str


@dataclass(slots=True, eq=False)
class Record:
    """A node of the graph in the making: an operator that ran, a part of its output, or a tensor there before.

    ``target`` is the operator (``None`` for a tensor there before), ``args`` and ``kwargs`` its arguments with records
    in the place of tensors; ``inputs`` are the positions of the records that it depends on, by data or otherwise.
    """

    position: int
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call
    phase: Phase
    origin: Origin
    inputs: set[int]
    storage: int | None = None


@dataclass(slots=True)
class _Recomputation:
    """A run of a checkpointed region: the positions of its first record, and of the last so far."""

    start: int
    last: int | None = None


class Recorder(OperatorMode):
    """Keeps a record of every operator that runs.

    Tensors are told apart by identity, and all are kept until the end so that no identity is used twice. A read
    depends on the record that made the tensor and on the last write into its storage, through whichever view: writes
    into views of one storage are so ordered after each other, as autograd itself orders them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.records: list[Record] = []
        self.phase = Phase.FORWARD
        self.values = KnownValues()
        self.storage_bytes: list[int] = []
        self._made_by: dict[int, Record] = {}
        self._kept: list[Any] = []
        self._storages: dict[int, int] = {}
        self._last_write: dict[int, Record] = {}
        self._module_stack: list[str] = []
        self._origin_of_sequence: dict[int, Origin] = {}
        self._recomputations: list[_Recomputation] = []  # those that are running
        self._stopped: list[tuple[int, int]] = []  # first and last record of recomputations that stopped early
        self._rehearsed: list[Call] | None = None
        self._run_by: dict[int, list[int]] = {}  # sequence number of an autograd node: records of its backward

    def add_input(self, name: str, tensor: torch.Tensor, phase: Phase, origin: Origin) -> Record:
        """A tensor that was there before the step."""
        call = Call(str(phase), (), (), (tensor_type(tensor),))
        record = self._add(None, (), {}, call, phase, origin)
        record.name = name
        self._keep(tensor, record)
        return record

    def record_of(self, tensor: torch.Tensor) -> Record:
        """What made ``tensor``; one that was never seen before is a constant of the model's code."""
        record = self._made_by.get(id(tensor))
        return self.add_input("constant", tensor, Phase.CONSTANT, self.origin()) if record is None else record

    def run(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            # Real kernels take other types too; the one for tensors without data does not.
            narrow = [tensor.to(torch.bfloat16) for tensor in args[:2]]
            return self.values.run(func, (*narrow, *args[2:]), kwargs).to(args[0].dtype)
        return self.values.run(func, args, kwargs)

    def observe(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if result is None and not func._schema.is_mutable:
            return
        call = describe_call(func, args, kwargs, result)
        if self._rehearsed is not None:
            self._rehearsed.append(call)
            return
        inputs: set[int] = set()
        own_args = self._with_records(args, inputs)
        own_kwargs = {name: self._with_records(value, inputs) for name, value in kwargs.items()}
        phase, origin = self.phase, self.origin()
        if self._recomputations:
            phase = Phase.RECOMPUTE
            if (before := self._recomputations[-1].last) is not None:
                inputs.add(before)
        record = self._add(func, own_args, own_kwargs, call, phase, origin, inputs)
        if self._recomputations:
            self._recomputations[-1].last = record.position
        elif phase is Phase.BACKWARD and (autograd_node := torch._C._current_autograd_node()) is not None:
            self._run_by.setdefault(autograd_node._sequence_nr(), []).append(record.position)
        for written in _written(func, args, kwargs):
            self._last_write[_storage(written) or id(written)] = record
        if isinstance(result, torch.Tensor):
            self._keep(result, record)
        else:
            self._keep_parts(result, record)

    def _add(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        phase: Phase,
        origin: Origin,
        inputs: set[int] | None = None,
    ) -> Record:
        position = len(self.records)
        name = f"{call.op.split('.')[1] if '.' in call.op else call.op}_{position}"
        record = Record(position, name, target, args, kwargs, call, phase, origin, inputs or set())
        self.records.append(record)
        return record

    def _with_records(self, value: Any, inputs: set[int]) -> Any:
        """An operator's argument with records for tensors; what it depends on is added to ``inputs``."""
        if isinstance(value, torch.Tensor):
            record = self.record_of(value)
            inputs.add(record.position)
            write = self._last_write.get(_storage(value) or id(value))
            if write is not None:
                inputs.add(write.position)
            return record
        if isinstance(value, (list, tuple)):
            return tuple(self._with_records(item, inputs) for item in value)
        return value

    def _keep(self, tensor: torch.Tensor, record: Record) -> None:
        self._made_by[id(tensor)] = record
        self._kept.append(tensor)
        storage = _storage(tensor)
        if storage is None:
            return
        index = self._storages.get(storage)
        if index is None:
            index = self._storages[storage] = len(self.storage_bytes)
            self.storage_bytes.append(int(tensor.untyped_storage().nbytes()))
        record.storage = index

    def _keep_parts(self, results: Any, record: Record) -> None:
        """A record for each output of an operator with several, and for each tensor of an output that is a list."""
        for position, output in enumerate(outputs_of(results)):
            if not isinstance(output, (torch.Tensor, list, tuple)):
                continue
            types = (tensor_type(output),) if isinstance(output, torch.Tensor) else ()
            call = Call(GETITEM, (position,), (), types)
            part = self._add(
                operator.getitem, (record, position), {}, call, record.phase, record.origin, {record.position}
            )
            if isinstance(output, torch.Tensor):
                self._keep(output, part)
            else:
                self._keep_parts(output, part)

    def kept_by(
        self, autograd_node: Any, saved: Iterable[torch.Tensor], *, whole: bool
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Memory that an autograd node keeps although none of its operators reads it, with the records of those.

        Of some tensors a backward needs only the shape. ``whole``: it keeps all of them, whichever it will read.
        """
        positions = self._run_by.get(autograd_node._sequence_nr(), [])
        read = {self.records[source].storage for position in positions for source in self.records[position].inputs}
        for tensor in saved:
            storage = self._storages.get(_storage(tensor) or -1)
            if storage is not None and positions and (whole or storage not in read):
                yield storage, tuple(positions)

    # --- where operators come from ------------------------------------------------------------------------------

    def origin(self) -> Origin:
        """What runs now. A backward operator comes from where its autograd node was made in the forward pass, found
        by the sequence number which autograd gives to each."""
        autograd_node = torch._C._current_autograd_node()
        if autograd_node is not None and not self._recomputations:
            origin = self._origin_of_sequence.get(autograd_node._sequence_nr(), Origin("", ""))
            if self.phase is Phase.BACKWARD:
                return origin
        else:
            origin = Origin(self.running_module, calling_line())
        sequence_number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._origin_of_sequence.setdefault(sequence_number - 1, origin)
        return origin

    @property
    def running_module(self) -> str:
        """The path of the innermost module that runs, empty outside of all."""
        return self._module_stack[-1] if self._module_stack else ""

    @contextmanager
    def within(self, module: str) -> Iterator[None]:
        """Operators inside belong to ``module`` or to its submodules."""
        self._module_stack.append(module)
        try:
            yield
        finally:
            self._module_stack.pop()

    @contextmanager
    def modules_of(self, model: torch.nn.Module) -> Iterator[None]:
        """Keeps the stack of the modules of ``model`` that are running."""
        path = {id(module): name for name, module in model.named_modules()}

        def enter(module: torch.nn.Module, args: Any) -> None:
            if id(module) in path:
                self._module_stack.append(path[id(module)])

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if id(module) in path:
                self._module_stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- parts of the backward pass that do not run operator by operator ----------------------------------------

    def begin_recomputation(self) -> None:
        """Operators run the forward pass once more from here on, in order: each depends on the one before."""
        self._recomputations.append(_Recomputation(start=len(self.records)))

    def end_recomputation(self, whole: Sequence[torch.Tensor]) -> None:
        """What reads a tensor of ``whole`` depends on all that was recomputed."""
        recomputation = self._recomputations.pop()
        last = recomputation.last
        if last is not None and not whole:
            self._stopped.append((recomputation.start, last))
        for tensor in whole:
            made_by = self.record_of(tensor)
            call = Call("aten.detach.default", (tensor_type(tensor),), (), (tensor_type(tensor),))
            inputs = {made_by.position, made_by.position if last is None else last}
            detach = torch.ops.aten.detach.default
            self._keep(tensor, self._add(detach, (made_by,), {}, call, Phase.RECOMPUTE, made_by.origin, inputs))

    def finish(self) -> None:
        """To be called after the backward pass.

        A recomputation stops at the last tensor that its region saved, also where that is read by nobody: an output
        that is not used, or a tensor of which only the shape is. All that reads from the region then depends on it.
        """
        for start, stop in self._stopped:
            readers = [
                record
                for record in self.records[stop + 1 :]
                if record.phase is Phase.BACKWARD and any(start <= source <= stop for source in record.inputs)
            ]
            if not any(stop in record.inputs for record in readers):
                for record in readers:
                    record.inputs.add(stop)

    def ancestors(self, results: Iterable[int], start: int = 0) -> set[int]:
        """The positions, from ``start`` on, of the records at ``results`` and of everything that they depend on."""
        found: set[int] = set()
        stack = list(results)
        while stack:
            position = stack.pop()
            if position >= start and position not in found:
                found.add(position)
                stack.extend(self.records[position].inputs)
        return found

    @contextmanager
    def rehearsal(self) -> Iterator[list[Call]]:
        """Operators inside are only listed, not recorded."""
        calls: list[Call] = []
        self._rehearsed = calls
        try:
            yield calls
        finally:
            self._rehearsed = None


def _storage(tensor: torch.Tensor) -> int | None:
    """The identity of the memory that a tensor lies in; sparse tensors have none of their own."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None


def _written(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that ``func`` writes into, as its schema declares."""
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


# --- lines of code ----------------------------------------------------------------------------------------------

_TORCH = str(Path(torch.__file__).parent)
_LAYERS = str(Path(torch.nn.modules.__file__).parent)
_HERE = str(Path(__file__).parent)
_PLUMBING = ("module.py", "container.py")


class _Code(NamedTuple):
    """What a line of some code is to a reader: the model's own, a layer of torch's, the start of the step, or none."""

    path: str
    is_models: bool
    is_layer: bool
    is_start: bool


_codes: dict[CodeType, _Code] = {}


def _code(code: CodeType) -> _Code:
    known = _codes.get(code)
    if known is None:
        folder, _, file = code.co_filename.rpartition("/")
        inside = code.co_filename.startswith((_TORCH, _HERE)) or code.co_filename.startswith("<")
        roots = [root for root in sys.path if root and code.co_filename.startswith(root + "/")]
        path = code.co_filename[len(max(roots, key=len)) + 1 :] if roots else code.co_filename
        is_start = folder == _HERE and file == "tracing.py"
        known = _Code(path, not inside, folder == _LAYERS and file not in _PLUMBING, is_start)
        _codes[code] = known
    return known


def is_models_or_layers(code: CodeType) -> bool:
    """Whether some code is a model's own or a layer's of torch, not the machinery around them."""
    known = _code(code)
    return known.is_models or known.is_layer


def calling_line() -> str:
    """The line of the model's code that runs now, ``file:line``; of torch's layer where the model is made of them."""
    frame, layer = sys._getframe(1), ""
    while frame is not None:
        code = _code(frame.f_code)
        if code.is_models:
            return f"{code.path}:{frame.f_lineno}"
        if code.is_start:
            break
        if code.is_layer:
            layer = f"{code.path}:{frame.f_lineno}"  # the outermost says most
        frame = frame.f_back  # type: ignore[assignment]
    return layer
