"""Polynomials of named integers, exact: what the integers of a graph are, and the prices that are made of them."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import lcm, prod
from typing import Any, NoReturn, TypeAlias

#: Names in order, each as often as its power: ``("batch_size", "seq_len", "seq_len")``; ``()`` is 1.
Monomial: TypeAlias = tuple[str, ...]
Number: TypeAlias = int | Fraction


class Polynomial:
    """A polynomial in the place of an integer: code that adds, subtracts and multiplies works on it as on a number.

    Whatever asks for its value (a comparison, a division, a rounding) raises TypeError, since the answer could differ
    from point to point; so what comes out of such code holds at every point.

    >>> batch_size, seq_len = Polynomial.of("batch_size"), Polynomial.of("seq_len")
    >>> scores = 2 * batch_size * seq_len * (seq_len + 1)
    >>> scores
    2 batch_size seq_len seq_len + 2 batch_size seq_len
    >>> scores.at({"batch_size": 3, "seq_len": 10})
    660
    >>> scores > 0
    Traceback (most recent call last):
    TypeError: whether a polynomial is more or less than something depends on the point
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, Number]) -> None:
        self.terms = {monomial: _plain(factor) for monomial, factor in terms.items() if factor}

    @classmethod
    def of(cls, name: str) -> "Polynomial":
        """The variable itself."""
        return cls({(name,): 1})

    def at(self, point: Mapping[str, int]) -> Number:
        """Its value where the variables are these."""
        value = sum(factor * prod(point[name] for name in monomial) for monomial, factor in self.terms.items())
        return _plain(value)

    @property
    def is_whole(self) -> bool:
        """Whether all coefficients are integers, so that all values are."""
        return all(type(factor) is int for factor in self.terms.values())

    def __add__(self, other: object) -> "Polynomial":
        if (added := terms_of(other)) is None:
            return NotImplemented
        return Polynomial({key: self.terms.get(key, 0) + added.get(key, 0) for key in {**self.terms, **added}})

    def __mul__(self, other: object) -> "Polynomial":
        if (factors := terms_of(other)) is None:
            return NotImplemented
        product: dict[Monomial, Number] = {}
        for one, by in self.terms.items():
            for two, times in factors.items():
                monomial = tuple(sorted(one + two))
                product[monomial] = product.get(monomial, 0) + by * times
        return Polynomial(product)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Polynomial":
        return self * -1

    def __sub__(self, other: "Polynomial | Number") -> "Polynomial":
        return self + (-other)

    def __rsub__(self, other: Number) -> "Polynomial":
        return -self + other

    def __pow__(self, power: object) -> Any:
        return prod([self] * power) if type(power) is int and power >= 0 else NotImplemented

    def _refuse_comparison(self, other: object) -> NoReturn:
        raise TypeError("whether a polynomial is more or less than something depends on the point")

    __lt__ = __le__ = __gt__ = __ge__ = _refuse_comparison

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("whether a polynomial is equal to something depends on the point")

    def __bool__(self) -> NoReturn:
        raise TypeError("whether a polynomial is 0 depends on the point")

    __hash__ = None  # type: ignore[assignment]  # nor can it be looked up

    def __repr__(self) -> str:
        return " + ".join(" ".join([str(factor), *monomial]) for monomial, factor in self.terms.items()) or "0"


def terms_of(value: object) -> Mapping[Monomial, Number] | None:
    """The terms of a polynomial, or of a number; ``None`` for anything else."""
    if isinstance(value, Polynomial):
        return value.terms
    return {(): value} if isinstance(value, (int, Fraction)) else None


def interpolated(
    monomials: Sequence[Monomial], points: Sequence[Mapping[str, int]], columns: Iterable[Sequence[int]]
) -> list[int | Polynomial]:
    """For each column, the polynomial of these monomials that has its values at the points; an integer if constant.

    There are as many points as monomials, at which such a polynomial is determined by its values.

    >>> interpolated([(), ("n",), ("n", "n")], [{"n": 2}, {"n": 3}, {"n": 5}], [(1, 3, 10), (7, 7, 7)])
    [-1/2 n + 1/2 n n, 7]
    """
    inverse = _inverse([[prod(point[name] for name in monomial) for monomial in monomials] for point in points])
    common = lcm(*(factor.denominator for row in inverse for factor in row))
    whole = [[int(factor * common) for factor in row] for row in inverse]
    found: list[int | Polynomial] = []
    for column in columns:
        if len(set(column)) == 1:
            found.append(column[0])
            continue
        sums = (sum(factor * value for factor, value in zip(row, column, strict=True)) for row in whole)
        found.append(
            Polynomial({monomial: Fraction(total, common) for monomial, total in zip(monomials, sums, strict=True)})
        )
    return found


def _plain(number: Number) -> Number:
    return number.numerator if number.denominator == 1 else number


def _inverse(matrix: Sequence[Sequence[int]]) -> list[list[Fraction]]:
    """By Gauss and Jordan, in rationals."""
    size = len(matrix)
    rows = [
        [Fraction(value) for value in row] + [Fraction(i == j) for j in range(size)] for i, row in enumerate(matrix)
    ]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = rows[column][column]
        rows[column] = [value / scale for value in rows[column]]
        for i in range(size):
            if i != column and (factor := rows[i][column]):
                rows[i] = [value - factor * base for value, base in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]
