"""Arithmetic of polynomials is that of the integers they stand for, and what cannot be is refused."""

import operator
from collections.abc import Callable
from fractions import Fraction
from math import comb, log2, prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtflops.polynomials import Polynomial, interpolated

NAMES = ("batch_size", "seq_len", "decoder_len")


def evaluated(formula: Any, leaf: Callable[[Any], Any]) -> Any:
    """A formula, nested tuples of an operation and its arguments, with ``leaf`` of its leaves."""
    if not isinstance(formula, tuple):
        return leaf(formula)
    operation, *arguments = formula
    if operation is pow:
        return evaluated(arguments[0], leaf) ** arguments[1]
    return operation(*(evaluated(argument, leaf) for argument in arguments))


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    both = st.tuples(st.sampled_from([operator.add, operator.sub, operator.mul]), children, children)
    return st.one_of(both, st.tuples(st.just(operator.neg), children), st.tuples(st.just(pow), children, st.just(2)))


FORMULAS = st.recursive(st.one_of(st.sampled_from(NAMES), st.integers(-(10**12), 10**12)), nested, max_leaves=6)


@given(FORMULAS, st.fixed_dictionaries({name: st.integers(-(10**6), 10**6) for name in NAMES}))
def test_a_formula_of_polynomials_has_the_values_of_the_formula(formula: Any, point: dict[str, int]) -> None:
    found = evaluated(formula, lambda leaf: Polynomial.of(leaf) if isinstance(leaf, str) else leaf)
    exact = evaluated(formula, lambda leaf: point[leaf] if isinstance(leaf, str) else leaf)
    value = found.at(point) if isinstance(found, Polynomial) else found
    assert value == exact
    assert type(value) is int


def test_products_of_shapes_as_formulas_make_them() -> None:
    n = Polynomial.of("n")
    assert prod((4, n, 3, n)).at({"n": 5}) == 300
    assert sum([n, 2, n]).at({"n": 5}) == 12
    assert (n * Fraction(1, 2)).at({"n": 5}) == Fraction(5, 2)
    assert not (n * Fraction(1, 2)).is_whole


@pytest.mark.parametrize(
    "question",
    [
        lambda n: n > 3,
        lambda n: max(n, 3),
        lambda n: n == 3,
        lambda n: n == n + 0,
        lambda n: n in (1, 2),
        lambda n: 0 if not n else 1,
        lambda n: n // 2,
        lambda n: n % 2,
        lambda n: n / 2,
        lambda n: 2**n,
        lambda n: n**-1,
        lambda n: round(n),
        lambda n: log2(n),
        lambda n: range(n),
        lambda n: {1: 2}.get(n),
        lambda n: n * 0.5,
    ],
)
def test_what_depends_on_the_value_is_refused(question: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        question(Polynomial.of("n"))


def test_interpolation_is_exact() -> None:
    points = [{"n": 2}, {"n": 3}, {"n": 7}]
    monomials = [(), ("n",), ("n", "n")]
    (found,) = interpolated(monomials, points, [[comb(point["n"], 2) * 10**30 for point in points]])
    assert isinstance(found, Polynomial)
    assert all(found.at({"n": n}) == comb(n, 2) * 10**30 for n in range(50))
