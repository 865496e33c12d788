"""What an operator costs: the user's own formulas, then the table, then other sources. Else it is unsupported."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeAlias

from gtflops.errors import InputError
from gtflops.operators.call import Call
from gtflops.operators.cost import Entry, Flops, FlopsByOutput, Kind, Price
from gtflops.operators.table import BY_OP

#: A formula as users write it; an integer counts as matrix products.
UserFormula: TypeAlias = Callable[[Call], Flops | FlopsByOutput | int]
#: Knows entries of operators that the table lacks.
Fallback: TypeAlias = Callable[[str], Entry | None]

_NAME = re.compile(r"([A-Za-z_]\w*)(?:::|\.)([A-Za-z_]\w*)(?:\.(\w+))?")

_registered: dict[str, Entry] = {}
_fallbacks: list[Fallback] = []


def lookup(op: str) -> Entry | None:
    """The entry for an operator named with or without overload, in place or not; ``None`` if it has none.

    What the user registered goes before the table, and the table before what ``add_fallback`` was given.

    >>> lookup("aten.add_.Tensor") is lookup("aten.add")
    True
    """
    found = _find(_registered, op) or _find(BY_OP, op)
    if found is None:
        found = next((entry for fallback in _fallbacks if (entry := fallback(op)) is not None), None)
    return found


def _find(entries: Mapping[str, Entry], op: str) -> Entry | None:
    """By the full name, without its overload, and without the underscore of an operator that works in place."""
    namespace, _, rest = op.partition(".")
    name = f"{namespace}.{rest.partition('.')[0]}"
    found = entries.get(op) or entries.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = entries.get(name[:-1])
    return found


def price(call: Call) -> Price | None:
    """FLOPs of an operator call, or ``None`` where nothing knows its price.

    >>> from gtflops.operators import TensorType
    >>> a, b = TensorType((2, 3), "float32"), TensorType((3, 5), "float32")
    >>> price(Call("aten.mm.default", (a, b), (), (TensorType((2, 5), "float32"),)))
    Flops(matmul=60, other=0)
    """
    entry = lookup(call.op)
    return None if entry is None else entry.formula(call)


def may_cost(call: Call) -> bool:
    """Whether a call is of an operator that is not declared free; one without a price may cost something."""
    entry = lookup(call.op)
    return entry is None or entry.kind is not Kind.FREE


def price_executed(call: Call) -> Flops | None:
    """FLOPs of a call that really ran: of several gradients, those that were asked for. ``None`` as :func:`price`."""
    cost = price(call)
    return cost.executed(call) if isinstance(cost, FlopsByOutput) else cost


def registrations() -> tuple[Entry, ...]:
    """What the user registered, in that order."""
    return tuple(_registered.values())


def add_fallback(fallback: Fallback) -> None:
    """Ask ``fallback`` for operators that neither the user nor the table prices."""
    if fallback not in _fallbacks:
        _fallbacks.append(fallback)


def register_flops(
    op: Any, *, kind: Kind | str = Kind.MATRIX_PRODUCT, replace: bool = False
) -> Callable[[UserFormula], UserFormula]:
    """Price an operator of your own: a decorator for a function of its :class:`gtflops.operators.Call`.

    ``op`` is ``"mylib::my_op"`` or ``"mylib.my_op"`` (with ``.overload`` for that one only), or the operator itself
    as torch or ``torch.library.custom_op`` gives it. The function must depend on the call's shapes, dtypes and plain
    arguments only. It returns FLOPs: ``Flops(matmul, other)``; an integer, which counts as matrix products, as in
    ``torch.utils.flop_counter.register_flop_formula``; or :class:`gtflops.operators.FlopsByOutput` for an operator
    that makes several gradients. Profiles made before keep their prices.

    Raises InputError for a name or ``kind`` that is none, and for an operator that has a price unless ``replace``; and,
    when a call is priced, for a result that is not one of these.

    >>> from gtflops import register_flops
    >>> from gtflops.operators import Call, Flops, TensorType, price
    >>> @register_flops("docs::scaled_product")
    ... def scaled_product(call):
    ...     (m, k), (_, n) = call.shape(0), call.shape(1)
    ...     return Flops(matmul=2 * m * k * n, other=m * n)
    >>> a, b = TensorType((2, 3), "float32"), TensorType((3, 5), "float32")
    >>> price(Call("docs.scaled_product.default", (a, b), (), (TensorType((2, 5), "float32"),)))
    Flops(matmul=60, other=10)
    """
    name = _name_of(op)
    try:
        kind = Kind(kind)
    except ValueError as error:
        raise InputError(f"kind is {kind!r}, expected one of {', '.join(Kind)}") from error
    before = _find(_registered, name) or _find(BY_OP, name)
    if before is not None and not replace:
        raise InputError(f"{name} has a price already ({before.text}); replace=True puts another in its place")

    def register(formula: UserFormula) -> UserFormula:
        if not callable(formula):
            raise InputError(f"the formula for {name} is {formula!r}, expected a function of a gtflops.operators.Call")

        @wraps(formula)
        def checked(call: Call) -> Price:
            try:
                cost = formula(call)
            except Exception as error:
                raise InputError(
                    f"the formula registered for {name} failed on {call.op}: {type(error).__name__}: {error}"
                ) from error
            return _checked(call, cost)

        text = (formula.__doc__ or "the user's formula").strip().splitlines()[0]
        source = f"registered by {getattr(formula, '__module__', '?')}.{getattr(formula, '__qualname__', '?')}"
        _registered[name] = Entry(kind, checked, (name,), text, source)
        return formula

    return register


def _name_of(op: Any) -> str:
    """``namespace.name`` or ``namespace.name.overload`` of a name or an operator of torch's."""
    text = op if isinstance(op, str) else getattr(op, "_qualname", None) or str(op)
    match = _NAME.fullmatch(text)
    if match is None:
        raise InputError(f"{op!r} names no operator, expected one such as 'mylib::my_op', or torch.ops.mylib.my_op")
    return ".".join(part for part in match.groups() if part)


def _checked(call: Call, cost: Any) -> Price:
    """What a user's formula returned, as a price."""
    if type(cost) is int:
        cost = Flops(matmul=cost)
    parts = (cost.shared, *cost.outputs) if isinstance(cost, FlopsByOutput) else (cost,)
    if not all(isinstance(part, Flops) and all(type(flops) is int and flops >= 0 for flops in part) for part in parts):
        raise InputError(
            f"the formula for {call.op} returned {cost!r}, expected Flops, FlopsByOutput or an integer, none below 0"
        )
    if isinstance(cost, FlopsByOutput) and len(cost.outputs) != len(call.outputs):
        raise InputError(
            f"the formula for {call.op} prices {len(cost.outputs)} outputs, expected {len(call.outputs)}, as it returns"
        )
    return cost  # type: ignore[no-any-return]  # checked above
