"""The processes that train one model together: what they agree on, and torch's engines that join their gradients.

Every agreement is a meeting of all processes, at which each also says what it came for and whether it has failed. So
what fails on one is an error on all of them, instead of a wait without end, and so is being at different places. What
fails while others wait for this process in torch's own communication is announced in the store of the process group;
their waiting ends when this process does (with gloo at once, ``torchrun`` ends them too) or by the group's timeout, and
they say then whose error it was.
"""

import gc
import hashlib
import itertools
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gtflops.capture import Loss, loss_of
from gtflops.capture.batches import with_tensors_replaced
from gtflops.capture.sharding import is_sharded, mesh_of, with_parameters
from gtflops.errors import InputError, ProcessesError

T = TypeVar("T")

#: Numbers that a process brings to a meeting.
_ROOM = 4

#: Tells what one :class:`Processes` announces from what others did, which are made in the same order on every process.
_serials = itertools.count()


class Processes:
    """The processes that train ``model`` together; for a model of one process, that one, and nothing is communicated.

    They are those of a ``DistributedDataParallel`` model (or of one that wraps ``model``), or of the mesh over which
    ``fully_shard`` has spread its tensors. Any other model is trained by its own process alone, also in a process group
    that other things use.

    ``model`` is what a training step calls, ``module`` what is in it: the names of its tensors are those of a run in
    one process. ``inside`` is a module with the same tensors to take in the place of ``module``.
    """

    def __init__(self, model: torch.nn.Module, inside: torch.nn.Module | None = None) -> None:
        self.model = model if isinstance(model, DistributedDataParallel) else _wrapper_of(model)
        self._ddp = self.model if isinstance(self.model, DistributedDataParallel) else None
        self.module: torch.nn.Module = inside or (self.model if self._ddp is None else self._ddp.module)
        _refuse_fsdp1(self.module)
        self._sharded = {name for name, tensor in self.module.named_parameters() if is_sharded(tensor)}
        self._replicas = 1
        self._group: Any = None
        if self._ddp is not None:
            _require_rewrappable(self._ddp)
            self._group = self._ddp.process_group
        elif self._sharded:
            mesh = mesh_of(self.module)
            self._group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
            self._replicas = mesh.size() // _num_shards(self.module)
        self.count = 1 if self._group is None else dist.get_world_size(self._group)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self._known: BaseException | None = None
        self._announcement = f"gtflops/failure/{next(_serials)}" if self.count > 1 else ""
        self._passes_communicate = bool(self._sharded) or any(
            isinstance(part, torch.nn.SyncBatchNorm) for part in self.module.modules()
        )

    # --- agreeing -------------------------------------------------------------------------------------------------

    def sums(self, what: str, *values: int) -> tuple[int, ...]:
        """Sums over all processes, exact. ``what`` is for messages, and has to be the same on all of them."""
        return tuple(map(sum, zip(*self._meet(what, *values), strict=True)))

    def sum(self, what: str, value: int) -> int:
        return self.sums(what, value)[0]

    def mean(self, what: str, value: float) -> float:
        return math.fsum(_float(bits) for (bits,) in self._meet(what, _bits(value))) / self.count

    def drop(self, what: str, value: float) -> float:
        """An expected drop in loss over all processes, each with its own shards, or each with all gradients."""
        return self.mean(what, value) * (self.count if self._sharded else 1)

    def any(self, what: str, value: bool) -> bool:
        return any(said for (said,) in self._meet(what, int(value)))

    def all(self, what: str, value: bool) -> bool:
        return all(said for (said,) in self._meet(what, int(value)))

    def require_same(self, what: str, value: str) -> None:
        """ProcessesError on all of them where ``value`` is not the same on all."""
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], signed=True)
        digests = [said for (said,) in self._meet(what, digest)]
        if len(set(digests)) > 1:
            shown = "; ".join(f"rank {rank}: {_shortened(text)}" for rank, text in enumerate(self._gather(value)))
            self._raise(ProcessesError(f"{what} must be the same on every rank, and is not: {shown}"))

    def first(self, what: str, compute: Callable[[], T]) -> T:
        """What the first process computes, or its error, on every one."""
        with self.together():
            value = compute() if self.rank == 0 else None
            if self.count > 1:
                self._meet(what)
                said = [value]
                dist.broadcast_object_list(said, group=self._group, group_src=0, device=self._device())
                value = said[0]
        return value  # type: ignore[return-value]

    def first_batch(self, batch: Any) -> Any:
        """The first process's batch, or one of the same shapes, masks and integers, on every one: for prices."""
        if self.count == 1:
            return batch
        shapes = self.first("the batch to select on", lambda: with_tensors_replaced(batch, _without_floats))
        device = next(self.module.parameters()).device
        return with_tensors_replaced(shapes, lambda tensor: tensor.contiguous().to(device))

    def averaged(self, importance: Mapping[str, float]) -> dict[str, float]:
        """Importances over all processes, the same to the bit on each: averaged, or added up over shards."""
        if self.count == 1:
            return dict(importance)
        self.require_same("the measured tensors", "\n".join(importance))
        own = torch.tensor(list(importance.values()), dtype=torch.float64, device=self._device())
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own, group=self._group)
        totals = sum(part.cpu() for part in parts)
        assert isinstance(totals, torch.Tensor)
        return {
            name: total / (self._replicas if name in self._sharded else self.count)
            for name, total in zip(importance, totals.tolist(), strict=True)
        }

    def gathered(self, what: str, value: T) -> list[T]:
        """``value`` of every process, by rank."""
        self._meet(what)
        return self._gather(value)

    def agreed(self, loss: Loss | None) -> Loss | None:
        """A loss that is an error on every process where it is not finite on one, before any of them goes back."""
        if self.count == 1:
            return loss

        def agreed_loss(outputs: Any, batch: Any) -> torch.Tensor:
            with self.together():
                value = loss_of(outputs, batch, loss)
                if not math.isfinite(number := value.item()):
                    raise ProcessesError(f"the loss is {number}, expected a finite number")
                self._meet("a loss")
            return value

        return agreed_loss

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails within fails on every process, at the next meeting: each raises its own error, or says whose."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not self._is_known(error):
                self._known = error
                self._meet("an error", failed=error)
            raise

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Around what the engine communicates in, where the others cannot be met: an error within is announced to them,
        and where it came of theirs, it says whose."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not self._is_known(error):
                self._known = error
                if whose := self._announced(f"rank {self.rank}: {type(error).__name__}: {error}"):
                    self._known = failure = ProcessesError(f"another process failed, so this one stops too: {whose}")
                    raise failure from error
            raise

    def passing(self) -> AbstractContextManager[None]:
        """Around passes through the model, in which some engines communicate and others do not."""
        return self.communicating() if self._passes_communicate else nullcontext()

    def _announced(self, own: str) -> str | None:
        """What another process announced before this one; ``None`` where there is none, and now ``own`` is."""
        with suppress(Exception):  # the store may have ended with the process that holds it
            store = dist.distributed_c10d._get_default_store()
            first = store.compare_set(self._announcement, "", own).decode()
            return None if first == own else first
        return None

    def _meet(self, what: str, *values: int, failed: BaseException | None = None) -> list[tuple[int, ...]]:
        """What each process says, by rank."""
        if self.count == 1:
            return [values]
        purpose = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], signed=True)
        said = [int(failed is not None), purpose, *values, *[0] * (_ROOM - len(values))]
        own = torch.tensor(said, dtype=torch.int64, device=self._device())
        parts = [torch.empty_like(own) for _ in range(self.count)]
        with self.communicating():
            dist.all_gather(parts, own, group=self._group)
        by_rank = [part.tolist() for part in parts]
        if any(flag for flag, *_ in by_rank):
            errors = self._gather(None if failed is None else f"{type(failed).__name__}: {failed}")
            if failed is None:
                whose = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None)
                self._raise(ProcessesError(f"another process failed, so this one stops too: {whose}"))
        elif len({purpose for _, purpose, *_ in by_rank}) > 1:
            places = "; ".join(f"rank {rank} is at {place!r}" for rank, place in enumerate(self._gather(what)))
            self._raise(
                ProcessesError(
                    f"the ranks are at different places: {places}; expected the same calls on every rank, with the "
                    "same number of batches"
                )
            )
        return [tuple(numbers[: len(values)]) for _, _, *numbers in by_rank]

    def _gather(self, value: T) -> list[T]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _raise(self, error: ProcessesError) -> None:
        self._known = error
        raise error

    def _is_known(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._known:
                return True
            error = error.__cause__
        return False

    def _device(self) -> torch.device:
        on_gpu = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    # --- gradients ------------------------------------------------------------------------------------------------

    def rewrap(self) -> None:
        """Make DDP communicate the tensors that require gradients now, and no others; it stays the same object.

        DDP knows its tensors from when it was built. One frozen since then leaves its bucket unready, so that it is
        not reduced, and one thawed since then is in none. The reducer, which holds buckets and hooks, is made anew as
        when a DDP model is unpickled; the weights are the same on all ranks already. FSDP2 needs nothing.
        """
        ddp = self._ddp
        if ddp is None:
            _require_unwrapped(self.module)
            return
        ddp._remove_autograd_hooks()
        parameters, sparse = ddp._build_params_for_reducer()
        if not parameters:
            return
        if ddp.static_graph:
            ddp._static_graph_delay_allreduce_enqueued = False
        ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), ddp.static_graph)
        if ddp.static_graph:
            for part in (ddp.reducer, ddp.logger):
                part._set_static_graph()  # type: ignore[union-attr]
        ddp._has_rebuilt_buckets = False
        hooks, ddp._comm_hooks = ddp._comm_hooks, []
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around passes through the inner module: DDP does not see the gradients of these."""
        if self._ddp is not None:
            self._ddp._remove_autograd_hooks()
        try:
            with self.passing():
                yield
        finally:
            self.rewrap()

    def syncing(self, last: bool) -> AbstractContextManager[None]:
        """Around a part of a step: gradients are joined in the last one."""
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def whole_model(self) -> torch.nn.Module:
        """The module, of a sharded one a copy with whole tensors on the CPU. All processes call it."""
        return with_parameters(self.module, self.whole) if self._sharded else self.module

    def whole(self, value: Any) -> Any:
        """A tensor, or everything in a state, with whole tensors in the place of shards. All processes call it."""

        def gathered(tensor: Any) -> Any:  # a copy: what is gathered is a part of a padded storage
            return tensor.detach().full_tensor().to("cpu", copy=True) if is_sharded(tensor) else tensor

        return _mapped(value, gathered)

    def take_weights(self, whole: torch.nn.Module) -> None:
        """The inverse of :meth:`whole_model`."""
        if whole is self.module:
            return
        own = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, tensor in whole.named_parameters():
                own[name].copy_(_sharded_like(own[name], tensor) if is_sharded(own[name]) else tensor)

    def sharded_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`whole` for the optimizer's ``state_dict()``."""
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        positions = [position for group in state["param_groups"] for position in group["params"]]
        by_position = dict(zip(positions, tensors, strict=True))

        def sharded(position: int, value: Any) -> Any:
            like = by_position[position]
            is_spread = isinstance(value, torch.Tensor) and is_sharded(like) and value.shape == like.shape
            return _sharded_like(like, value) if is_spread else value

        return {
            **state,
            "state": {
                position: {key: sharded(position, value) for key, value in values.items()}
                for position, values in state["state"].items()
            },
        }


# --- starting ---------------------------------------------------------------------------------------------------


@contextmanager
def started() -> Iterator[torch.device | None]:
    """The process group that ``torchrun`` prepared in the environment, and this process's device; ``None`` without.

    NCCL with a GPU for each process of the host, gloo on the CPU where there are not as many.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield None
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in its launch; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def in_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` in DDP where processes were started, else itself."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


# --- in detail --------------------------------------------------------------------------------------------------


def _wrapper_of(model: torch.nn.Module) -> torch.nn.Module:
    """The DDP that wraps ``model`` in this process, else ``model``: a callback is handed the inner one."""
    if not (dist.is_available() and dist.is_initialized()):
        return model
    wrappers = (known for known in gc.get_objects() if type(known) is DistributedDataParallel)
    return next((known for known in wrappers if known.__dict__["_modules"].get("module") is model), model)


def _require_unwrapped(model: torch.nn.Module) -> None:
    if _wrapper_of(model) is not model:
        raise InputError(
            f"{type(model).__name__} was wrapped in DistributedDataParallel after the trainer was built, so "
            "that what is communicated would not follow the selection; expected it wrapped before"
        )


def _require_rewrappable(ddp: DistributedDataParallel) -> None:
    unsupported = {
        "mixed_precision": ddp.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "the python reducer of torch.compile": ddp._use_python_reducer,
    }
    for name, given in unsupported.items():
        if given:
            raise InputError(
                f"DistributedDataParallel with {name} cannot be wrapped anew when the selection changes; expected it "
                "without (for lower precision, torch.autocast)"
            )


def _refuse_fsdp1(model: torch.nn.Module) -> None:
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in map(type, model.modules())}
    if "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel" in kinds:
        raise InputError(
            "the model is a FullyShardedDataParallel (FSDP1), which flattens tensors; expected FSDP2: "
            "torch.distributed.fsdp.fully_shard"
        )


def _num_shards(model: torch.nn.Module) -> int:
    from torch.distributed.tensor import Shard

    tensor: Any = next(tensor for tensor in model.parameters() if is_sharded(tensor))
    (dimension,) = (index for index, placement in enumerate(tensor.placements) if isinstance(placement, Shard))
    return int(tensor.device_mesh.size(dimension))


def _sharded_like(like: Any, tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.detach().to(like.device, like.dtype if like.is_floating_point() else None),
        like.device_mesh,
        like.placements,
        src_data_rank=None,
    )


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _without_floats(tensor: torch.Tensor) -> torch.Tensor:
    """Prices do not depend on the values of floats, so one element stands for all."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return tensor.cpu()


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _float(bits: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)
