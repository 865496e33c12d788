"""The uses of a tensor that several modules hold, as a tied embedding: gradients through some of them alone.

A *use* is a place, a module and the name of its attribute, and bears its path: ``lm_head.weight``. A module that runs
several times is one place, and so one use.
"""

import copy
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils import stateless

from gtflops.capture.sharding import is_sharded
from gtflops.errors import InputError, UnsupportedModelError
from gtflops.graph import Uses

Model = TypeVar("Model", bound=torch.nn.Module)


class FrozenUse(torch.nn.Parameter):
    """Stands for a ``shared`` tensor, on its memory, where a module is to see its values and to give it no gradient."""

    shared: torch.nn.Parameter

    @classmethod
    def of(cls, shared: torch.nn.Parameter) -> "FrozenUse":
        use: FrozenUse = torch.Tensor._make_subclass(cls, shared.detach(), False)
        use.shared = shared
        return use

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenUse":
        """Of a model that is copied, on the memory of the copy."""
        if id(self) not in memo:
            memo[id(self)] = FrozenUse.of(copy.deepcopy(self.shared, memo))
        copied: FrozenUse = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a model that is pickled, likewise."""
        return FrozenUse.of, (self.shared,)


class _Place(NamedTuple):
    """Where a tensor is held."""

    module: torch.nn.Module
    attribute: str

    @property
    def tensor(self) -> torch.nn.Parameter:
        """What is held there now."""
        tensor = self.module._parameters[self.attribute]
        assert tensor is not None
        return tensor

    @property
    def shared(self) -> torch.nn.Parameter:
        """The model's own tensor, also where another one stands for it."""
        tensor = self.tensor
        return tensor.shared if isinstance(tensor, FrozenUse) else tensor

    def hold(self, tensor: torch.nn.Parameter) -> None:
        """By way of the module, which may keep its tensors in other ways as well (``torch.nn.LSTM`` does)."""
        if self.tensor is not tensor:
            setattr(self.module, self.attribute, tensor)


def _places(model: torch.nn.Module) -> dict[str, _Place]:
    """Every place by its path, of a module with several the first."""
    return {
        f"{path}.{attribute}".removeprefix("."): _Place(module, attribute)
        for path, module in model.named_modules()
        for attribute, tensor in module._parameters.items()
        if tensor is not None
    }


def _shared_places(model: torch.nn.Module) -> list[dict[str, _Place]]:
    """The places of each floating-point tensor that has several. UnsupportedModelError where it is sharded."""
    places: dict[int, dict[str, _Place]] = {}
    for name, place in _places(model).items():
        if place.shared.is_floating_point():
            places.setdefault(id(place.shared), {})[name] = place
    shared = [uses for uses in places.values() if len(uses) > 1]
    for uses in shared:
        if is_sharded(next(iter(uses.values())).shared):
            raise UnsupportedModelError(
                f"{' and '.join(uses)} are one tensor, which fully_shard has spread over processes and gathers as a "
                "whole, for all of its uses; expected uses=None, or a model that each process holds whole "
                "(DistributedDataParallel)"
            )
    return shared


def has_strayed(model: torch.nn.Module) -> bool:
    """Whether a use that is not trained is on another memory than its tensor by now: ``model.to()`` moves each."""
    held = (place.tensor for place in _places(model).values())
    return any(isinstance(use, FrozenUse) and use.data_ptr() != use.shared.data_ptr() for use in held)


def check_uses(uses: Any) -> None:
    """InputError for what is neither ``None`` nor one of :data:`gtflops.graph.Uses`."""
    if uses not in (None, "separate"):
        raise InputError(
            f"uses is {uses!r}, expected 'separate', each use of a shared tensor by itself, or None, all as one"
        )


def named_tensors(model: torch.nn.Module, uses: Uses | None) -> dict[str, torch.nn.Parameter]:
    """What can be trained or frozen, by its name: parameters, or each use of them as it is held now."""
    if uses is None:
        return _tied_parameters(model)
    return {name: place.tensor for name, place in _places(model).items()}


def owners(model: torch.nn.Module, uses: Uses | None) -> dict[str, torch.nn.Parameter]:
    """The same names with the model's own tensors, which optimizers hold: one for all uses of a shared tensor."""
    if uses is None:
        return _tied_parameters(model)
    return {name: place.shared for name, place in _places(model).items()}


def _tied_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Of a model whose modules hold what they share: another one would be taken for a model of more tensors."""
    parameters = dict(model.named_parameters())
    if frozen := [name for name, tensor in parameters.items() if isinstance(tensor, FrozenUse)]:
        raise InputError(
            f"{frozen[0]!r} stands for a shared tensor, since uses of it were trained by themselves; expected "
            "gtflops.tie(model) before, or uses='separate'"
        )
    return parameters


def uses_of_shared(model: torch.nn.Module, uses: Uses | None) -> list[tuple[str, ...]]:
    """For each tensor of several uses, their names; none where ``uses`` is ``None``."""
    return [] if uses is None else [tuple(places) for places in _shared_places(model)]


def train_uses(model: torch.nn.Module, names: Set[str]) -> None:
    """Let gradients go through exactly the uses of these names, and drop those that others have given.

    Optimizers keep what they hold, and ``state_dict()`` what it has: a use that is not trained sees the same memory by
    another tensor, which requires no gradient. :func:`tie` ends that.
    """
    separate = [places for places in _shared_places(model) if not names.isdisjoint(places)]
    tie(model)
    trained = {id(place.tensor) for name, place in _places(model).items() if name in names}
    for name, place in _places(model).items():
        place.tensor.requires_grad_(id(place.tensor) in trained)
        if name not in names:
            place.tensor.grad = None
    for places in separate:
        for name, place in places.items():
            if name not in names:
                place.hold(FrozenUse.of(place.tensor))


def tie(model: Model) -> Model:
    """Let every module that shares a tensor hold the tensor itself again, and return the model.

    With ``uses="separate"``, modules through which a shared tensor is not trained hold another one, on the same memory.
    :meth:`gtflops.GreenTrainer.fit` ends with this by itself, and so does the callback.

    >>> import gtflops, torch
    >>> class Tied(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    ...         self.head.weight = self.embed.weight
    ...     def forward(self, tokens):
    ...         return self.head(self.embed(tokens))
    >>> model, tokens = Tied(), torch.arange(7)
    >>> profile = gtflops.profile(model, tokens, loss=lambda y, x: y.square().sum(), uses="separate")
    >>> profile.names
    ('head.weight', 'embed.weight')
    >>> importance = {"head.weight": 2.0, "embed.weight": 1.0}
    >>> model = gtflops.select(profile, importance, budget=1, must_freeze="embed*").apply(model)
    >>> model.embed.weight is model.head.weight, model.embed.weight.data_ptr() == model.head.weight.data_ptr()
    (False, True)
    >>> gtflops.tie(model).embed.weight is model.head.weight
    True
    """
    for place in _places(model).values():
        place.hold(place.shared)
    return model


def standing_in(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    uses: Uses | None,
) -> AbstractContextManager[None]:
    """Inside, the model has these tensors: parameters by the names of :func:`named_tensors`, buffers by their own."""
    if uses is None:
        return stateless._reparametrize_module(model, {**parameters, **buffers}, tie_weights=True)
    # Told not to tie what is one tensor, torch has to be given each place of a buffer.
    name_of = {id(tensor): name for name, tensor in model.named_buffers()}
    everywhere = {
        f"{path}.{name}".removeprefix("."): buffers[name_of[id(tensor)]]
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    }
    return stateless._reparametrize_module(model, {**parameters, **everywhere}, tie_weights=False)


@contextmanager
def separated(model: torch.nn.Module, uses: Uses | None) -> Iterator[Mapping[str, torch.nn.Parameter]]:
    """Inside, each use of a shared tensor is a tensor of its own, on its memory, which gets its own gradient.

    Gives what the model has then, by name.
    """
    shared = [place for places in _shared_places(model) for place in places.values()] if uses else []
    before = [place.tensor for place in shared]
    try:
        for place in shared:
            place.hold(torch.nn.Parameter(place.shared.detach()))
        yield named_tensors(model, uses)
    finally:
        for place, tensor in zip(shared, before, strict=True):
            place.hold(tensor)
