"""What each batch of a run costs: one profile for every shape, without a trace for most of them."""

from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gtflops.capture import Loss, batch_types
from gtflops.capture.batches import batch_tensors
from gtflops.capture.resizing import Layout, layout_of
from gtflops.errors import InputError
from gtflops.profiling import Profile, profile

#: The greatest length that is traced ahead of its coming: enough for most, and masks of it take no memory to speak of.
LONGEST_AHEAD = 2048


class Prices:
    """The profile of a step for any batch of a model, the same to the integer as profiling the model on it.

    What the operators of a step may depend on is told apart: the batch's layout, types and plain values, whether its
    masks hold padding, and which modules train. Batches that differ by sizes only are priced by :meth:`Profile.at`:
    when the first of another length comes, a short and a long batch are traced, and lengths between them need no trace.
    """

    def __init__(self, model: torch.nn.Module, loss: Loss | None) -> None:
        self._model = model
        self._loss = loss
        self._known: dict[Hashable, Profile] = {}
        self._bases: dict[Hashable, Profile] = {}
        self._traced_ahead: dict[tuple[Hashable, str], int] = {}
        self._has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def add(self, known: Profile, batch: Any = None) -> None:
        """Take a profile of the model on ``batch``; without one, it answers for batches of the same types only."""
        modes = self._modes()
        if batch is None:
            self._known[(tuple(known.graph.batch.items()), (), modes)] = known
            return
        self._known[(tuple(batch_types(batch).items()), _values(batch), modes)] = known
        layout = self._layout(batch)
        if layout is not None:
            self._bases.setdefault(self._kind(batch, layout), known)

    def of(self, batch: Any) -> Profile:
        """The profile of a step on ``batch``. The errors are those of :func:`gtflops.profile`."""
        types = tuple(batch_types(batch).items())
        modes = self._modes()
        values = _values(batch)
        for key in ((types, values, modes), (types, (), modes)):
            if key in self._known:
                return self._known[key]
        priced = self._at_sizes_of(batch) or profile(self._model, batch, self._loss)
        self.add(priced, batch)
        return priced

    def _at_sizes_of(self, batch: Any) -> Profile | None:
        """From the profile of a batch that differs by its sizes; ``None`` where there is none."""
        layout = self._layout(batch)
        if layout is None or (base := self._bases.get(kind := self._kind(batch, layout))) is None:
            return None
        sizes = dict(layout.sizes.items())
        with suppress(InputError):  # sizes that cannot be told apart: the batch itself is traced
            self._trace_ahead(kind, base, layout)
            return base.at(**sizes)
        return None

    def _trace_ahead(self, kind: Hashable, base: Profile, layout: Layout) -> None:
        """Once for batches of a kind, and again where one is longer than all before."""
        positions = getattr(getattr(self._model, "config", None), "max_position_embeddings", None) or LONGEST_AHEAD
        for name, size in layout.sizes.items():
            if name != "batch_size" and size > self._traced_ahead.get((kind, name), 1):
                longest = max(size, min(positions, LONGEST_AHEAD))
                self._traced_ahead[kind, name] = longest
                for extreme in (2, longest):
                    with suppress(InputError):  # nobody asked for this length: the model may refuse it
                        base.at(**{name: extreme})

    def _layout(self, batch: Any) -> Layout | None:
        with suppress(InputError):  # a batch without sizes
            return layout_of(batch, has_decoder=self._has_decoder)
        return None

    def _kind(self, batch: Any, layout: Layout) -> Hashable:
        names_and_types = tuple((name, kind.dtype, len(kind.shape)) for name, kind in batch_types(batch).items())
        return names_and_types, layout.roles, _values(batch), self._modes()

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._model.modules())


def _values(batch: Any) -> tuple[Hashable, ...]:
    """Plain values of a batch, and whether each mask is without padding: models choose operators by both."""
    plain_values = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (bool, int, float, str)))
    full = (bool(tensor.all()) for name, tensor in batch_tensors(batch) if "mask" in name)
    return (*plain_values, *full)
