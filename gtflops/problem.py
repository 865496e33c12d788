"""What `select` and `frontier` solve: a profile, importances and conditions, reduced to items and their worth."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from gtflops.blocks import block_of
from gtflops.element_limit import rounding_of, solve_limited
from gtflops.errors import InfeasibleBudgetError, InputError
from gtflops.forms import CostName, Form, FormName, GraphForm, Solution, fill
from gtflops.profiling import Profile, Reuse
from gtflops.units import format_flops, format_seconds

Granularity: TypeAlias = Literal["tensor", "layer"]
Patterns: TypeAlias = "str | Iterable[str]"

_MANY_EPOCHS = 10**9
_LARGEST = float(np.finfo(np.float64).max)
_RUNS_ALWAYS = "what runs whatever is trained, input gradients included (model.disable_input_require_grads() ends them)"


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem of selection, to be solved at any limit of its cost, in FLOPs or nanoseconds.

    ``values`` are the importances aligned with ``profile.tensors``, 0 where there is no gradient; ``forced`` tensors
    are trained whatever is chosen. ``item_of`` says which item of ``form`` each tensor belongs to, and ``worth`` what
    each item adds: 0 for what is forced or frozen.
    """

    profile: Profile
    importance: Mapping[str, float]
    cost: CostName
    epochs_left: int | None
    held: tuple[str, ...]
    form_name: FormName
    granularity: Granularity
    max_elements: int | None
    values: npt.NDArray[np.float64]
    forced: npt.NDArray[np.bool_]
    item_of: npt.NDArray[np.intp]
    worth: npt.NDArray[np.float64]
    form: Form

    @classmethod
    def of(
        cls,
        profile: Profile,
        importance: Mapping[str, float],
        *,
        form: FormName = "graph",
        granularity: Granularity = "tensor",
        must_train: Patterns = (),
        must_freeze: Patterns = (),
        max_elements: int | None = None,
        cost: CostName = "flops",
        reuse: Reuse | None = None,
        epochs_left: int | None = None,
        held: tuple[str, ...] = (),
        allow_unsupported: bool = False,
    ) -> "Problem":
        """Arguments and errors are those of :func:`gtflops.select`; ``held`` are those of
        :meth:`gtflops.Profile.form`, and nothing that they depend on is trained."""
        if not allow_unsupported:
            profile.require_prices()
        _require_one_of("form", form, FormName)
        _require_one_of("granularity", granularity, Granularity)
        max_elements = None if max_elements is None else _positive_integer("max_elements", max_elements)
        epochs_left = _epochs_left(reuse, epochs_left)
        whole = exact_form(profile, cost, epochs_left, held)
        values = _values(profile, importance)
        forced = matching(profile.names, "must_train", must_train)
        frozen = matching(profile.names, "must_freeze", must_freeze) | profile.below(held)
        if (both := np.flatnonzero(forced & frozen)).size:
            raise InputError(
                f"{len(both)} tensors match must_train and must_freeze, first {profile.names[both[0]]!r}; expected "
                "patterns that no tensor matches both of"
            )
        undecided = ~forced & ~frozen & _has_gradient(profile)
        item_of = np.arange(len(values)) if granularity == "tensor" else _layers(profile.names, undecided)
        worth = np.zeros(item_of.max(initial=-1) + 1)
        np.add.at(worth, item_of, np.where(undecided, values, 0.0))
        problem = cls(
            profile,
            dict(importance),
            cost,
            epochs_left,
            held,
            form,
            granularity,
            max_elements,
            values,
            forced,
            item_of,
            worth,
            _left(whole, form, forced, item_of if granularity == "layer" else None),
        )
        problem._require_something_to_train()
        return problem

    def over_epochs(self, epochs_left: int | None) -> "Problem":
        """The same problem with reuse over another number of epochs, or without it."""
        whole = exact_form(self.profile, self.cost, epochs_left, self.held)
        item_of = self.item_of if self.granularity == "layer" else None
        form = _left(whole, self.form_name, self.forced, item_of)
        return replace(self, epochs_left=epochs_left, form=form)

    def fits(self, mask: npt.NDArray[np.bool_]) -> bool:
        """Whether a selection is within the limit on elements."""
        return self.max_elements is None or int(_numel(self.profile)[mask].sum()) <= self.max_elements

    def solve(self, limit: int) -> Solution:
        """The best tensors whose step costs at most ``limit``; InfeasibleBudgetError where there are none."""
        if limit < self.form.base:
            raise self.infeasible(limit)
        best = (
            self.form.solve(self.worth, limit)
            if self.max_elements is None
            else solve_limited(self.form, self.worth, self._elements, limit, self._room)
        )
        chosen = best.mask
        if not best.optimal:
            room = self._room - int(self._elements[chosen].sum())
            chosen = fill(self.form, chosen, self.worth, self._elements, limit, room)
        if not chosen.any() and not self._forced_train:
            raise self.infeasible(limit)
        mask = self.forced | chosen[self.item_of]
        cost = self.exact.total(mask)
        if cost > limit:
            raise AssertionError(f"a selection of {cost} exceeds its limit of {limit} ({self.cost})")
        value = math.fsum(self.values[mask])
        if best.optimal:
            return Solution(mask, value, value, optimal=True)
        rounding = rounding_of(abs(self.values))
        bound = best.upper_bound + math.fsum(self.values[self.forced]) + rounding
        return Solution(mask, value, max(value, bound), optimal=False)

    @property
    def exact(self) -> GraphForm:
        """All tensors, at their exact cost."""
        return exact_form(self.profile, self.cost, self.epochs_left, self.held)

    @cached_property
    def smallest(self) -> int:
        """The smallest limit that a selection fits."""
        if self._forced_train:
            return self.form.base
        return int(self.form.alone()[(self.worth > 0) & (self._elements <= self._room)].min())

    @cached_property
    def full(self) -> int:
        """What a step costs in which everything is trained."""
        return full_cost(self.profile, self.cost)

    @cached_property
    def _elements(self) -> npt.NDArray[np.int64]:
        """How many elements each item has."""
        elements = np.zeros(len(self.worth), dtype=np.int64)
        np.add.at(elements, self.item_of, _numel(self.profile))
        return elements

    @cached_property
    def _room(self) -> float:
        """How many elements may be trained besides those that must: an integer, or infinity without a limit."""
        if self.max_elements is None:
            return math.inf
        return self.max_elements - int(_numel(self.profile)[self.forced].sum())

    @cached_property
    def _forced_train(self) -> bool:
        """Whether anything is trained if nothing is chosen."""
        return bool((self.forced & _has_gradient(self.profile)).any())

    def _require_something_to_train(self) -> None:
        if not (self._forced_train or (self.worth > 0).any()):
            raise InputError(
                f"no {self.granularity} that may be chosen has a positive importance, so the selection would be empty "
                "and nothing would be trained; expected at least one"
            )
        if self.max_elements is None:
            return
        if self._room < 0:
            raise InfeasibleBudgetError(
                f"max_elements={self.max_elements} is less than the {self.max_elements - self._room} elements of what "
                "must train"
            )
        if not self._forced_train and (least := int(self._elements[self.worth > 0].min())) > self._room:
            raise InfeasibleBudgetError(
                f"max_elements={self.max_elements} is less than any {self.granularity} of positive importance has; the "
                f"smallest has {least}"
            )

    def infeasible(self, limit: int) -> InfeasibleBudgetError:
        """The error of a limit below the smallest that a selection fits."""
        assert limit < self.smallest
        always, full = self.exact.base, self.full
        if limit < always:
            runs = _RUNS_ALWAYS if self.profile.step_flops("none").backward else "the forward pass alone"
            if self.held:
                runs += f", without the {len(self.held)} blocks whose activations are stored"
            elif self.epochs_left is not None and always < self.over_epochs(None).exact.base:
                runs += f", its blocks run in one of {self.epochs_left} epochs"
            reason = f"is below {runs} ({always / full:.4f} of a full step)"
        elif self._forced_train:
            reason = "leaves too little for what must train"
        else:
            reason = f"leaves too little for any {self.granularity} of positive importance"
            if self.max_elements is not None:
                reason += f" and at most {self.max_elements} elements"
        if self.form_name == "chain" and limit >= always:
            reason += " in the chain form"
        if self.cost == "flops":
            given, exact = format_flops(limit), f"budget_flops={self.smallest}"
        else:
            given, exact = format_seconds(limit / 1e9), f"budget_seconds={self.smallest / 1e9!r}"
        return InfeasibleBudgetError(
            f"budget {limit / full:.4f} ({given}) {reason}; {self._other_floor()}the smallest feasible budget for this "
            f"model and batch is {self._share(self.smallest)} ({exact})"
        )

    def _other_floor(self) -> str:
        """The smallest feasible budget without reuse where this is with it, and the other way round."""
        if self.held:  # what stands below was never asked
            return f"without reuse, the forward pass alone is {self._share(exact_form(self.profile, self.cost).base)}; "
        if self.profile.graph.always or not self.profile.blocks:
            return ""
        without, with_reuse = (self.over_epochs(epochs).smallest for epochs in (None, _MANY_EPOCHS))
        if self.epochs_left is not None and self.smallest < without:
            return f"without reuse, none below {self._share(without)} is feasible; "
        if with_reuse >= without:
            same = "reuse changes nothing, because nothing below what would be trained can be left out; "
            return "" if self.epochs_left is None else same
        not_here = ", but only where an epoch begins that whole ones follow: not here" if self.epochs_left == 1 else ""
        return f"reuse='prefix' makes {self._share(with_reuse)} feasible over many epochs{not_here}; "

    def _share(self, cost: int) -> str:
        """Of a full step, rounded up."""
        return f"{-(-10_000 * cost // self.full) / 10_000:.4f}"


def _left(
    whole: GraphForm, name: FormName, forced: npt.NDArray[np.bool_], item_of: npt.NDArray[np.intp] | None
) -> Form:
    """What is left of a form over all tensors where ``forced`` ones are paid and others are merged to items."""
    form: Form = whole if name == "graph" else whole.chain
    if forced.any():
        form = form.paid(forced)
    return form if item_of is None else form.merged(item_of)


def exact_form(
    profile: Profile,
    cost: CostName,
    epochs_left: int | None = None,
    held: tuple[str, ...] = (),
) -> GraphForm:
    """The problem over all tensors of a profile, at its exact cost. InputError without such a cost."""
    _require_one_of("cost", cost, CostName)
    return profile.form(cost, epochs_left, held)


def full_cost(profile: Profile, cost: CostName) -> int:
    """What a step costs in which everything is trained."""
    return exact_form(profile, cost).total(np.ones(len(profile.names), dtype=np.bool_))


def limit_of(
    profile: Profile,
    cost: CostName = "flops",
    budget: float | None = None,
    budget_flops: int | None = None,
    budget_seconds: float | None = None,
) -> int:
    """What a step may cost, FLOPs or nanoseconds: a share of a full step (0.5 without any), or as given.

    InputError if it is none.
    """
    given = {"budget": budget, "budget_flops": budget_flops, "budget_seconds": budget_seconds}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise InputError(f"{' and '.join(f'{name}={value!r}' for name, value in named.items())} given, expected one")
    if budget_flops is not None:
        if cost != "flops":
            raise InputError(f"budget_flops={budget_flops!r} given with cost={cost!r}, expected budget_seconds")
        return _positive_integer("budget_flops", budget_flops)
    if budget_seconds is not None:
        if cost != "time":
            raise InputError(f"budget_seconds={budget_seconds!r} given with cost={cost!r}, expected cost='time'")
        if not _is_number(budget_seconds) or not 0 < budget_seconds <= _LARGEST:
            raise InputError(f"budget_seconds is {budget_seconds!r}, expected a positive number")
        return int(_decimal(budget_seconds) * 10**9)
    share = 0.5 if budget is None else budget
    if not _is_number(share) or not 0 < share <= 1:
        raise InputError(f"budget is {share!r}, expected a share of a full step in (0, 1]")
    return part_of(share, full_cost(profile, cost))


def _epochs_left(reuse: Reuse | None, epochs_left: int | None) -> int | None:
    """How many epochs share what the first one stores, or ``None`` where nothing is reused."""
    if reuse is None:
        if epochs_left is not None:
            raise InputError(f"epochs_left={epochs_left!r} given without reuse='prefix', which alone depends on it")
        return None
    _require_one_of("reuse", reuse, Reuse)
    if epochs_left is None:
        raise InputError("reuse='prefix' pays by the epochs that are left: expected epochs_left, such as epochs_left=5")
    return _positive_integer("epochs_left", epochs_left)


def part_of(share: float, whole: int) -> int:
    """``share`` of ``whole``, rounded down; the decimal number that was written: 0.6 means 6/10."""
    return int(_decimal(share) * whole)


def _positive_integer(name: str, value: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{name} is {value!r}, expected a positive integer")
    return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _decimal(value: float) -> Fraction:
    """0.6 means 6/10, not the double just below it."""
    return Fraction(repr(float(value)))


def _require_one_of(name: str, given: object, expected: Any) -> None:
    values = get_args(expected)
    if given not in values:
        raise InputError(f"{name} is {given!r}, expected {' or '.join(map(repr, values))}")


def _has_gradient(profile: Profile) -> npt.NDArray[np.bool_]:
    return np.array([tensor.has_gradient for tensor in profile.tensors], dtype=np.bool_)


def _numel(profile: Profile) -> npt.NDArray[np.int64]:
    return np.array([tensor.numel for tensor in profile.tensors], dtype=np.int64)


def matching(names: Sequence[str], argument: str, patterns: Patterns) -> npt.NDArray[np.bool_]:
    """Which of the names match one of the patterns; InputError for a pattern that none does."""
    matched = np.zeros(len(names), dtype=np.bool_)
    if not isinstance(patterns, Iterable):
        raise InputError(f"{argument} is {patterns!r}, expected a pattern of names such as '*.bias', or several")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise InputError(f"{argument} has {pattern!r}, expected patterns of names such as '*.bias'")
        matches = np.array([fnmatchcase(name, pattern) for name in names], dtype=np.bool_)
        if not matches.any():
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise InputError(
                f"no tensor matches {argument}={pattern!r}; nearest names: {', '.join(close)}; expected a "
                "name, or a pattern with * for any characters"
            )
        matched |= matches
    return matched


def _layers(names: Sequence[str], undecided: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """The item of each tensor: one for each layer's undecided tensors, and one for each tensor that is decided."""
    layers = layers_of(names)
    items: dict[tuple[str, bool], int] = {}
    return np.array(
        [
            items.setdefault((layer, True) if is_open else (name, False), len(items))
            for name, layer, is_open in zip(names, layers, undecided, strict=True)
        ],
        dtype=np.intp,
    )


def layers_of(names: Sequence[str]) -> list[str]:
    """The path of the layer that each tensor belongs to, from the tensors' names.

    A block is a module in a list of modules, whose name is a number: ``model.layers.3``; of blocks in blocks, the
    outermost. A tensor outside of all belongs to the largest module around it that has no block in it, or, where each
    has, to the module that holds it.

    >>> layers_of(["vit.layer.0.attention.q.weight", "vit.embeddings.patch.weight", "vit.cls_token", "head.bias"])
    ['vit.layer.0', 'vit.embeddings', 'vit', 'head']
    """
    paths = [name.split(".")[:-1] for name in names]
    blocks = [block_of(".".join(path)) for path in paths]
    parts_of_blocks = [block.split(".") for block in blocks if block is not None]
    around_blocks = {tuple(parts[:end]) for parts in parts_of_blocks for end in range(len(parts))}
    layers = []
    for path, block in zip(paths, blocks, strict=True):
        without_block = (path[:end] for end in range(1, len(path) + 1) if tuple(path[:end]) not in around_blocks)
        layers.append(".".join(next(without_block, path)) if block is None else block)
    return layers


def _values(profile: Profile, importance: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Importances aligned with ``profile.tensors``; 0 for tensors that the loss does not depend on."""
    missing = [name for name in profile.names if name not in importance]
    known = set(profile.names)
    unknown = [name for name in importance if name not in known]
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of {len(profile.names)} tensors, first {missing[0]!r}")
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), profile.names, n=1, cutoff=0.3)
            nearest = f" (nearest: {close[0]!r})" if close else ""
            parts.append(f"has {len(unknown)} names that the profile does not, first {unknown[0]!r}{nearest}")
        raise InputError(f"importance {' and '.join(parts)}; expected one number for each tensor of the profile")
    for name in profile.names:
        value = importance[name]
        if not _is_number(value) or not abs(value) <= _LARGEST:
            raise InputError(f"importance of {name!r} is {value!r}, expected a finite number")
    return np.array(
        [float(importance[tensor.name]) if tensor.has_gradient else 0.0 for tensor in profile.tensors],
        dtype=np.float64,
    )
