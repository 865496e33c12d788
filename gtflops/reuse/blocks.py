"""The blocks that are not run again: which can be, and what each returns in place of running."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gtflops.errors import InputError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks that follow each other from the first on; what the last one returns is stored."""

    names: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]

    @property
    def boundary(self) -> str:
        """The name of the last block."""
        return self.names[-1]


def stretches_of(model: torch.nn.Module, blocks: Iterable[str]) -> tuple[Stretch, ...]:
    """The blocks by the list that they are in; a module in no list is a stretch by itself.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> stretch, = stretches_of(model, ["0", "1"])
    >>> stretch.boundary
    '1'
    >>> stretches_of(model, ["1"])
    Traceback (most recent call last):
    gtflops.errors.InputError: the blocks ['1'] of the model's list are not those from its first on; expected ['0'], ...
    """
    names = list(blocks)
    if not names or isinstance(blocks, str):
        raise InputError(f"blocks is {blocks!r}, expected the names of the blocks to skip, such as ['model.layers.0']")
    modules = {name: _module(model, name) for name in names}
    parents = [_parent(model, name) for name in names]
    stretches = []
    for parent in dict.fromkeys(parents):
        members = [name for name, its in zip(names, parents, strict=True) if its == parent]
        if parent is not None:
            members.sort(key=lambda name: int(name.rpartition(".")[2]))
            expected = [f"{parent}.{index}" if parent else str(index) for index in range(len(members))]
            if members != expected:
                where = parent or "the model's list"
                raise InputError(
                    f"the blocks {members} of {where} are not those from its first on; expected {expected}, each once"
                )
            stretches.append(Stretch(tuple(members), tuple(modules[name] for name in members)))
        else:
            stretches += [Stretch((name,), (modules[name],)) for name in members]
    return tuple(stretches)


@dataclass(frozen=True, slots=True)
class Output:
    """What a block returns besides its hidden states, so that it can be returned without running the block.

    ``num_items`` is the length of the tuple that the hidden states are the first of, or None where they are all.
    ``has_position_bias``: the second is T5's relative position bias, which its first block makes for all. All other
    items are None then; ``Watch`` sees to it that none of them is used.
    """

    num_items: int | None
    has_position_bias: bool

    @classmethod
    def of(cls, name: str, block: torch.nn.Module, output: Any) -> "Output":
        """As seen when the block ran. UnsupportedModelError where it returns what cannot be told without running it."""
        if isinstance(output, torch.Tensor):
            return cls(None, False)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            if _makes_position_bias(block) and len(output) == 3 and output[1] is not None:
                return cls(3, True)
            if all(item is None or isinstance(item, torch.Tensor) for item in output[1:]):
                return cls(len(output), False)
        raise UnsupportedModelError(
            f"{name} ({type(block).__name__}) returns {_described(output)}, expected hidden states, or a tuple that "
            "they are the first of; give a boundary of your own: a module around it that returns one tensor"
        )

    def with_hidden(
        self, block: torch.nn.Module, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the block returns when ``hidden`` is what it would have computed."""
        if self.num_items is None:
            return hidden
        if not self.has_position_bias:
            return (hidden, *(None,) * (self.num_items - 1))
        # Those of cross-attention are all 0: blocks above that are handed none make them by themselves.
        return hidden, _position_bias(block, hidden, args, kwargs), None


def is_of_encoder(model: torch.nn.Module) -> Callable[[torch.nn.Module], bool] | None:
    """Whether a module is of the encoder of an encoder-decoder; ``None`` for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = {id(module) for module in model.get_encoder().modules()}  # type: ignore[operator]
    return lambda module: id(module) in encoder


def callers_of(model: torch.nn.Module, stretches: Iterable[Stretch]) -> dict[str, torch.nn.Module]:
    """The modules that the blocks are in, by path."""
    paths = {""}
    for stretch in stretches:
        parts = stretch.boundary.split(".")
        paths.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return {path: model.get_submodule(path) for path in sorted(paths)}


def require_not_compiled(modules: Mapping[str, torch.nn.Module]) -> None:
    """InputError where a module that calls skipped blocks is compiled: it would be compiled anew for each batch."""
    for path, module in modules.items():
        if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            raise InputError(
                f"{path or 'the model'} is compiled, and calls blocks that are to be skipped; expected each block "
                "compiled by itself: for block in model.model.layers: block.compile()"
            )


def hidden_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a block was called with: ``hidden_states``, or the first tensor."""
    given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    hidden = next((value for value in given if isinstance(value, torch.Tensor)), None)
    if hidden is None:
        raise UnsupportedModelError(
            f"{name} is called with {_described(tuple(args))} and {sorted(kwargs)}, expected a tensor among them: its "
            "hidden states, first or by the name hidden_states"
        )
    return hidden


@contextmanager
def replaced(block: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calling the block calls ``forward``, inside the ``with``; a compiled block runs eagerly there."""
    its = vars(block)
    new = {"forward": forward, "_compiled_call_impl": None}
    own = {name: its[name] for name in new if name in its}  # accelerate's hooks are a forward of the block's own
    its.update(new)
    try:
        yield
    finally:
        for name in new:
            del its[name]
        its.update(own)


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, _LISTS)}
        known = "; ".join(f"{_joined(path, 0)} to {_joined(path, size - 1)}" for path, size in lists.items() if size)
        raise InputError(
            f"the model has no module {name!r}; expected blocks of a ModuleList ({known or 'it has none'}), or, as a "
            "boundary of your own, the name of one module that returns a tensor"
        ) from None


_LISTS = (torch.nn.ModuleList, torch.nn.Sequential)


def _parent(model: torch.nn.Module, name: str) -> str | None:
    """The path of the list that the block is in."""
    path, _, _ = name.rpartition(".")
    return path if isinstance(model.get_submodule(path), _LISTS) else None


def _makes_position_bias(block: torch.nn.Module) -> bool:
    """Whether it is a block of the T5 family, and its bias is apart from the mask.

    It is since the family's attention goes through transformers' common interface; before, the first block returned
    the sum of both.
    """
    try:
        attention = block.layer[0].SelfAttention  # type: ignore[index, union-attr]
    except (AttributeError, IndexError, TypeError):
        return False
    return hasattr(attention, "compute_bias") and hasattr(
        sys.modules[type(block).__module__], "eager_attention_forward"
    )


def _position_bias(
    block: Any, hidden: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """``1 x num_heads x seq_len x seq_len``: what the blocks in front made, or, in the first, made as it does."""
    handed: torch.Tensor | None = args[2] if len(args) > 2 else kwargs.get("position_bias")
    if handed is not None:
        return handed
    seq_len = hidden.shape[1]
    bias: torch.Tensor = block.layer[0].SelfAttention.compute_bias(seq_len, seq_len, device=hidden.device)
    return bias


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple ({', '.join(type(item).__name__ for item in value)})"
    return f"{type(value).__name__}"


def _joined(path: str, index: int) -> str:
    return f"{path}.{index}" if path else str(index)
