"""What each batch of a run costs: one profile for every shape, without a trace for most of them."""

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gtflops.capture import Loss, batch_types
from gtflops.capture.batches import batch_tensors
from gtflops.capture.resizing import Layout, layout_of
from gtflops.errors import InputError
from gtflops.graph import Uses
from gtflops.operators import TensorType
from gtflops.profiling import Profile, profile

#: The greatest length that is traced ahead of its coming: enough for most, and masks of it take no memory to speak of.
LONGEST_AHEAD = 2048


class Prices:
    """The profile of a step for any batch of a model, the same to the integer as profiling the model on it.

    What the operators of a step may depend on is told apart: the batch's layout, types and plain values, whether its
    masks hold padding, and which modules train. Batches that differ by sizes only are priced by :meth:`Profile.at`:
    when the first of another length comes, a short and a long batch are traced, and lengths between them need no trace.
    """

    def __init__(self, model: torch.nn.Module, loss: Loss | None, uses: Uses | None = None) -> None:
        self._model = model
        self._loss = loss
        self._uses = uses
        self._known: dict[_Look, Profile] = {}
        self._bases: dict[Hashable, Profile] = {}
        self._traced_ahead: dict[tuple[Hashable, str], int] = {}
        self._has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def add(self, known: Profile, batch: Any = None) -> None:
        """Take a profile of the model on ``batch``; without one, it answers for batches of the same types only."""
        if batch is None:
            self._known[_Look(tuple(known.graph.batch.items()), (), self._modes())] = known
            return
        look = self._look(batch)
        self._known[look] = known
        if (layout := self._layout(batch)) is not None:
            self._bases.setdefault(look.kind(layout), known)

    def of(self, batch: Any) -> Profile:
        """The profile of a step on ``batch``. The errors are those of :func:`gtflops.profile`."""
        look = self._look(batch)
        for key in (look, replace(look, values=())):
            if key in self._known:
                return self._known[key]
        layout = self._layout(batch)
        kind = None if layout is None else look.kind(layout)
        known = None
        if layout is not None and kind in self._bases:
            known = self._at_sizes_of(layout, kind, self._bases[kind])
        if known is None:
            known = profile(self._model, batch, self._loss, uses=self._uses)
        if kind is not None:
            self._bases.setdefault(kind, known)
        self._known[look] = known
        return known

    def _at_sizes_of(self, layout: Layout, kind: Hashable, base: Profile) -> Profile | None:
        """From the profile of a batch that differs by its sizes; ``None`` where they cannot be told apart."""
        with suppress(InputError):
            self._trace_ahead(kind, base, layout)
            return base.at(**dict(layout.sizes.items()))
        return None

    def _trace_ahead(self, kind: Hashable, base: Profile, layout: Layout) -> None:
        """Once for batches of a kind, and again where one is longer than all before."""
        positions = getattr(getattr(self._model, "config", None), "max_position_embeddings", None) or LONGEST_AHEAD
        for name, size in layout.sizes.items():
            if name != "batch_size" and size > self._traced_ahead.get((kind, name), 1):
                longest = max(size, LONGEST_AHEAD if name == "num_targets" else min(positions, LONGEST_AHEAD))
                self._traced_ahead[kind, name] = longest
                for extreme in (2, longest):
                    with suppress(InputError):  # nobody asked for this length: the model may refuse it
                        base.at(**{name: extreme})

    def _layout(self, batch: Any) -> Layout | None:
        with suppress(InputError):  # a batch without sizes
            return layout_of(batch, has_decoder=self._has_decoder)
        return None

    def _look(self, batch: Any) -> "_Look":
        return _Look(tuple(batch_types(batch).items()), _values(batch), self._modes())

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._model.modules())


@dataclass(frozen=True, slots=True)
class _Look:
    """All that the operators of a step may depend on."""

    types: tuple[tuple[str, TensorType], ...]
    values: tuple[Hashable, ...]
    modes: tuple[bool, ...]

    def kind(self, layout: Layout) -> Hashable:
        """The same but for the sizes."""
        types = tuple((name, tensor.dtype, len(tensor.shape)) for name, tensor in self.types)
        return types, layout.roles, self.values, self.modes


def _values(batch: Any) -> tuple[Hashable, ...]:
    """Plain values of a batch, and whether each mask is without padding: models choose operators by both."""
    plain_values = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (bool, int, float, str)))
    full = (bool(tensor.all()) for name, tensor in batch_tensors(batch) if "mask" in name)
    return (*plain_values, *full)
