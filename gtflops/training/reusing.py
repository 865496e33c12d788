"""Reuse of a frozen prefix in the loop: the blocks that are held, what steps cost by it, and what is still owed."""

import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from gtflops.capture import Loss
from gtflops.errors import InputError, UnsupportedModelError
from gtflops.graph import Phase, Uses
from gtflops.operators import Call
from gtflops.profiling import Profile, Trainable
from gtflops.reuse import ActivationStore, PlannedPass, Prefix
from gtflops.training.pricing import Prices


@dataclass(frozen=True, slots=True)
class BatchCosts:
    """What a step on one batch costs, by how its forward pass will run.

    ``ordinary`` is the profile of a step as the model is, ``as_run`` of one whose blocks below the boundary are in
    evaluation mode. ``stored`` are the FLOPs of these blocks, in a forward pass, and ``planned`` the pass to come.
    ``is_filling`` in the epoch that fills the store: what is found there already is not spent on anything else then,
    so that a run that was killed goes on as it would have.
    """

    ordinary: Profile
    as_run: Profile
    stored: int = 0
    planned: PlannedPass | None = None
    is_filling: bool = False

    @property
    def reused(self) -> bool:
        """Whether the blocks below the boundary will not run."""
        return self.planned is not None and self.planned.reused

    @property
    def full_flops(self) -> int:
        """Of an ordinary step with every tensor trained."""
        return self.ordinary.full_flops

    @property
    def forward_flops(self) -> int:
        return self.as_run.forward_flops - (self.stored if self.reused else 0)

    @property
    def charged(self) -> int:
        """What of ``stored`` the budget is charged with."""
        return self.stored if self.is_filling or not self.reused else 0

    @property
    def saved(self) -> int:
        """What of that is not executed."""
        return self.charged if self.reused else 0

    def step_flops(self, trainable: Trainable) -> int:
        """What the budget is charged with for the step to come, in which nothing below the boundary may be trained."""
        return self.as_run.step_flops(trainable).total - self.stored + self.charged

    def around_forward(self) -> AbstractContextManager[Any]:
        """What the forward pass has to run in."""
        return nullcontext() if self.planned is None else self.planned.run()


class Reusing:
    """The blocks that a run does not compute twice, and the budget that is spent ahead for it.

    A step that fills the store costs more than later ones, which a budget for the average of all has to pay for: what
    the steps of an epoch spend on later ones is ``owed``, and is paid back in equal parts by each step after the epoch,
    until the last one.
    """

    def __init__(
        self,
        profile: Profile,
        model: torch.nn.Module,
        prices: Prices,
        loss: Loss | None,
        store: ActivationStore | str | Path,
        uses: Uses | None,
        batch_first: bool,
    ) -> None:
        self.store = store if isinstance(store, ActivationStore) else ActivationStore(store)
        self.held: tuple[str, ...] = ()
        self.filled_in: int | None = None
        """The epoch in which the store is filled up to the boundary."""
        self.owed = 0
        self.owed_ahead = 0
        """What the steps of the present epoch spent on later ones: none of it is paid back before these."""
        self._profile = profile
        self._model = model
        self._ordinary = prices
        self._as_run: Prices | None = None
        self._loss = loss
        self._uses = uses
        self._batch_first = batch_first
        self._prefix: Prefix | None = None
        self._has_warned = False

    def hold(self, blocks: tuple[str, ...], epoch: int) -> None:
        """Store what these blocks compute from here on, in the place of others."""
        if blocks == self.held:
            return
        self.held, self.filled_in = blocks, epoch
        self._prefix, self._as_run = None, None
        if blocks:
            tensors = zip(self._profile.tensors, self._profile.below(blocks), strict=True)
            self._prefix = Prefix(
                self._model,
                blocks,
                self.store,
                batch_first=self._batch_first,
                own_loss=self._loss is not None,
                apart=[tensor.name for tensor, is_below in tensors if tensor.has_gradient and not is_below],
            )
            self.store.make_room_again()

    def _priced_as_run(self, batch: Any, ordinary: Profile) -> Profile:
        """Without dropout below the boundary, steps may consist of other operators: then they are priced apart."""
        assert self._prefix is not None
        if self._as_run is self._ordinary:
            return ordinary
        prices = self._as_run or Prices(self._model, self._loss, self._uses)
        with self._prefix.modes_of_passes():
            as_run = prices.of(batch)
        if self._as_run is None:
            # Where the forward passes are the same operators, what stands above the boundary has the same gradients.
            is_same = _forward_calls(ordinary) == _forward_calls(as_run)
            self._as_run = self._ordinary if is_same else prices
        return as_run

    def below(self, profile: Profile, trained: Collection[str]) -> tuple[str, ...]:
        """The blocks that nothing trained stands in or below: of each list of blocks, those from its first on."""
        below: list[str] = []
        ended: set[str] = set()
        for name in profile.step_flops(trained, reuse="prefix").blocks:
            path = name.rpartition(".")[0]
            # What is trained without a gradient needs no block; where it stands in one, it may not be left out.
            if any(tensor.startswith(f"{name}.") for tensor in trained):
                ended.add(path)
            if path not in ended:
                below.append(name)
        return tuple(below)

    def costs(self, batch: Any, epoch: int) -> BatchCosts:
        """What a step on the batch costs; where blocks are held, what is stored for it is read here."""
        ordinary = self._ordinary.of(batch)
        if self._prefix is None:
            return BatchCosts(ordinary, ordinary)
        as_run = self._priced_as_run(batch, ordinary)
        planned = self._prefix.plan(batch)
        if not (planned.reused or epoch == self.filled_in or self._has_warned or self.store.full):
            self._has_warned = True
            why = planned.why_together or (
                f"{sum(self.store.rejected.values())} entries were damaged; expected the same inputs as in the epoch "
                "that stored them: no augmentation, no padding in front to other lengths, none left out by turns"
            )
            warnings.warn(
                f"epoch {epoch} has examples that nothing is stored of, and they cost more than the budget counts on: "
                f"{why}",
                stacklevel=2,
            )
        return BatchCosts(ordinary, as_run, as_run.stored_flops(self.held), planned, epoch == self.filled_in)

    # --- what is owed -----------------------------------------------------------------------------------------

    def due(self, steps_left: int) -> int:
        """What each of the steps left has to pay back."""
        return -(-self.owed // max(1, steps_left))

    def begin_epoch(self) -> None:
        """What was spent ahead is to be paid back from here on."""
        self.owed, self.owed_ahead = self.owed + self.owed_ahead, 0

    def owed_after(
        self, charged: int, epoch: int, epochs_left: int, steps_left: int, has_room: bool
    ) -> tuple[int, int]:
        """``owed`` and ``owed_ahead`` after a step that is charged with FLOPs of blocks below the boundary: what
        nothing is stored of, for want of room, is not spent on later steps."""
        owed = self.owed - min(self.owed, self.due(steps_left))
        if epoch != self.filled_in or epochs_left < 2 or not has_room:
            return owed, self.owed_ahead
        return owed, self.owed_ahead + charged * (epochs_left - 1) // epochs_left

    # --- what a run can be resumed from -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As plain data; what is stored is in the store."""
        return {
            "held": list(self.held),
            "filled_in": self.filled_in,
            "owed": self.owed,
            "owed_ahead": self.owed_ahead,
            "prefix": None if self._prefix is None else self._prefix.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`state_dict`."""
        self.hold(tuple(state["held"]), state["filled_in"])
        self.filled_in, self.owed, self.owed_ahead = state["filled_in"], state["owed"], state["owed_ahead"]
        if self._prefix is not None:
            self._prefix.load_state_dict(state["prefix"])


def _forward_calls(profile: Profile) -> list[Call]:
    return [node.call for node in profile.graph.nodes if node.phase is Phase.FORWARD]


def reusing_of(
    profile: Profile,
    model: torch.nn.Module,
    prices: Prices,
    loss: Loss | None,
    reuse: Any,
    store: Any,
    uses: Uses | None,
    batch_first: bool,
) -> Reusing | None:
    """From the arguments of a trainer. InputError where they do not go together."""
    if reuse is None:
        if store is not None or batch_first:
            given = "batch_first=True" if store is None else f"store={str(store)!r}"
            raise InputError(f"{given} given without reuse='prefix', which alone stores activations")
        return None
    if reuse != "prefix":
        raise InputError(f"reuse is {reuse!r}, expected 'prefix' or None")
    if store is None:
        raise InputError(
            "reuse='prefix' keeps activations on the disk: expected store, a folder, or "
            "gtflops.reuse.ActivationStore(folder, max_bytes=...)"
        )
    if any(isinstance(tensor, DTensor) for tensor in model.parameters()):
        raise UnsupportedModelError(
            f"the tensors of {profile.graph.model} are sharded, and what a frozen prefix is cannot be told from a part "
            "of it; expected a model that each process holds whole (DDP), or no reuse"
        )
    profile.require_blocks()
    return Reusing(profile, model, prices, loss, store, uses, batch_first)
