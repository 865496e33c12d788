"""What runs in front of a boundary besides the skipped blocks: watched once, in a pass that computes everything."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gtflops.errors import UnsupportedModelError

#: Rotary embeddings whose frequencies depend on the longest row of the batch, and of batches before it.
OF_THE_LENGTH = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class Front:
    """Names of the tensors that were read, and of the modules that were called, until the boundary was reached.

    ``autocast`` is the dtype that operators of the skipped blocks were cast to, if they were.
    """

    tensors: tuple[str, ...]
    modules: tuple[str, ...]
    autocast: torch.dtype | None

    def without(self, modules: Container[str], tensors: Container[str]) -> "Front":
        """What is not in these modules, and none of these tensors."""
        return Front(
            tuple(name for name in self.tensors if name.rpartition(".")[0] not in modules and name not in tensors),
            tuple(name for name in self.modules if name not in modules),
            self.autocast,
        )


class Watch(TorchFunctionMode):
    """Finds the :class:`Front` of a forward pass: from the first call of a module in the ``with`` to :meth:`reached`.

    A tensor is of the front if a function of torch takes it, or if it is of a called module that has no others in it
    (whose function may be a custom one). UnsupportedModelError, naming the module, where something draws random numbers
    although nothing is in training mode, or where what is computed depends on the length of the batch; and, up to the
    end of the ``with``, where a function takes what :meth:`leave_out` was told to be of no use, or, above the boundary,
    what comes from what blocks :meth:`returned` that is not stored.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model = model
        self._device = device
        self._names: dict[int, str] = {}
        for name, tensor in _named_tensors(model):
            self._names.setdefault(id(tensor), name)
        self._tensors: dict[str, None] = {}
        self._modules: dict[str, None] = {}
        #: States of the random generators when the modules that are running were called, the outermost first.
        self._generators: list[bytes] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._left_out: dict[int, tuple[str, torch.Tensor]] = {}
        #: What is computed from what blocks below the last of a stretch return, outside of the blocks.
        self._not_again: dict[int, tuple[str, torch.Tensor]] = {}
        self._in_block = False
        self._watching = False

    def __enter__(self) -> "Watch":
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._before(name), prepend=True))
            self._hooks.append(module.register_forward_hook(self._after(name)))
        self._watching = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._watching = False
        self._left_out.clear()
        self._not_again.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def leave_out(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Block ``name`` returns these besides its hidden states, and will not when it is skipped."""
        self._left_out.update((id(tensor), (name, tensor)) for tensor in tensors)

    def returned(self, name: str, result: torch.Tensor, *, is_stored: bool) -> None:
        """Block ``name`` returns these hidden states; where they are not stored, only skipped blocks may take them."""
        if is_stored:
            self._not_again.pop(id(result), None)  # a block may return what it is given
        else:
            self._not_again[id(result)] = name, result

    @contextmanager
    def in_block(self) -> Iterator[None]:
        """A skipped block runs: what it takes is of no matter."""
        before, self._in_block = self._in_block, True
        try:
            yield
        finally:
            self._in_block = before

    def reached(self, boundary: str, autocast: torch.dtype | None) -> Front:
        """The boundary is reached: what was in front of it."""
        self._watching = False
        if self._drawn() != self._generators[0]:
            raise _random(f"the model draws random numbers in front of {boundary}, outside of its modules")
        return Front(tuple(self._tensors), tuple(self._modules), autocast)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Asking for a dtype or a device is reading no value, and what runs outside of the model is none of it.
        watching = self._watching and self._generators
        not_again: tuple[str, torch.Tensor] | None = None
        if (watching or self._left_out or self._not_again) and getattr(func, "__name__", "") != "__get__":
            for tensor in _tensors_in((args, kwargs)):
                if watching and id(tensor) in self._names:
                    self._tensors[self._names[id(tensor)]] = None
                if id(tensor) in self._left_out:
                    raise UnsupportedModelError(
                        f"{self._left_out[id(tensor)][0]} returns a tensor besides its hidden states, which "
                        f"{getattr(func, '__name__', func)} takes above it and which is not stored; give a boundary of "
                        "your own: a module around it that returns one tensor"
                    )
                if not self._in_block:
                    not_again = not_again or self._not_again.get(id(tensor))
        if not_again is not None and not watching:
            raise UnsupportedModelError(
                f"what {not_again[0]} returns is taken above the boundary too, by {getattr(func, '__name__', func)}, "
                "and only what the last of the blocks returns is stored; expected no block above it to be skipped"
            )
        result = func(*args, **(kwargs or {}))
        if not_again is not None:
            self._not_again.update((id(tensor), (not_again[0], tensor)) for tensor in _tensors_in(result))
        return result

    def _before(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if not self._watching:
                return
            self._modules[name] = None
            if not any(True for _ in module.children()):
                self._tensors.update((self._names[id(tensor)], None) for _, tensor in _named_tensors(module))
            _require_same_for_any_length(name, module)
            self._generators.append(self._drawn())

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._watching and self._generators.pop() != self._drawn():
                raise _random(f"{name} ({type(module).__name__}) draws random numbers in evaluation mode")

        return hook

    def _drawn(self) -> bytes:
        """The states of PyTorch's generators, which differ after a random number."""
        states = [torch.get_rng_state()]
        if self._device.type != "cpu":
            states.append(torch.get_device_module(self._device).get_rng_state())
        return b"".join(state.cpu().numpy().tobytes() for state in states)


def _require_same_for_any_length(name: str, module: torch.nn.Module) -> None:
    kinds = getattr(module, "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if kind in OF_THE_LENGTH:
            raise UnsupportedModelError(
                f"{name} ({type(module).__name__}) has rotary embeddings of type {kind!r}, whose frequencies depend on "
                "the length of the batch, so an example's activations do; expected another type, such as 'yarn'"
            )


def _random(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}, so what the prefix computes for an example differs each time; expected none but dropout, or a "
        "boundary in front of it"
    )


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
