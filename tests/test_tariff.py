"""Prices at other sizes without a graph: the same, to the integer, as those of the graph's nodes."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtflops
from gtflops import Profile, operators
from gtflops.operators.pricing import _registered
from gtflops.shapes import Family, Interpolated
from gtflops.tariff import Tariff
from test_shapes import ENCODER_DECODERS, build, tokens

FAMILIES = ("llama", "mistral", "gemma3", "gpt2", "opt", "bloom", "mixtral", "bert", "t5", "bart")


def is_built(profile: Profile) -> bool:
    return "graph" in vars(profile)


@cache
def spanned(family: str) -> tuple[Any, Profile]:
    """A small model, and a profile of it that has been traced from the least to the largest sizes."""
    model = build(family)
    lengths = [(17, 11), (9, 5), (48, 32)] if family in ENCODER_DECODERS else [(17,), (8,), (48,)]
    (first, *others), batches = lengths, (3, 2, 8)
    profile = gtflops.profile(model, tokens(batches[0], *first))
    for batch_size, sizes in zip(batches[1:], others, strict=True):
        profile.at(batch_size=batch_size, **dict(zip(("seq_len", "decoder_len"), sizes, strict=False)))
    profile.at(batch_size=4, seq_len=32)
    return model, profile


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_costs_without_a_graph_are_those_of_the_graph(family: str, data: st.DataObject) -> None:
    _, profile = spanned(family)
    # Odd lengths, but for those of the profile, are inside of what was traced, as long as no two sizes are equal.
    sizes = {"batch_size": data.draw(st.integers(2, 8)), "seq_len": 2 * data.draw(st.integers(9, 22)) + 1}
    if family in ENCODER_DECODERS:
        sizes["decoder_len"] = data.draw(
            st.integers(3, 15).map(lambda n: 2 * n + 1).filter(lambda n: n not in sizes.values())
        )
    found = profile.at(**sizes)
    assert "interpolated" in found.notes[-1]
    step = profile._shapes.at(found._sizes)  # type: ignore[union-attr, arg-type]
    assert isinstance(step, Interpolated)
    exact = Profile.from_graph(step.graph)
    masks = data.draw(
        st.lists(st.lists(st.booleans(), min_size=len(found.names), max_size=len(found.names)), max_size=4)
    )
    for mask in (np.array(row, dtype=np.bool_) for row in masks):
        for ops in ("all", "matmul"):
            assert found.step_flops(mask, ops=ops) == exact.step_flops(mask, ops=ops)  # type: ignore[arg-type]
        assert found.form("flops").total(mask) == exact.form("flops").total(mask) == exact.step_flops(mask).total
    assert found.step_flops("all") == exact.step_flops("all")
    assert found.full_flops == exact.full_flops
    assert found.forward_flops == exact.forward_flops
    assert found.names == exact.names
    assert found.tensors == exact.tensors
    assert (found.t_dw == exact.t_dw).all()
    assert (found.t_dy == exact.t_dy).all()
    assert (found.alone_flops == exact.alone_flops).all()
    assert found.unsupported == exact.unsupported
    assert not is_built(found)
    assert found.graph == exact.graph
    assert (found.prices == exact.prices).all()
    assert found.by_operator() == exact.by_operator()


def test_a_selection_needs_no_graph() -> None:
    model, profile = spanned("llama")
    found = profile.at(batch_size=5, seq_len=31)
    importance = dict.fromkeys(found.names, 1.0)
    selection = gtflops.select(found, importance, 0.6)
    assert not is_built(found)
    fresh = gtflops.profile(model, tokens(5, 31))
    assert selection.names == gtflops.select(fresh, importance, 0.6).names
    assert selection.flops == fresh.step_flops(selection.names).total
    assert f"{found!r}" == f"{fresh!r}"


def test_what_is_made_of_such_a_profile_is_whole() -> None:
    model, profile = spanned("gpt2")
    found, fresh = profile.at(batch_size=5, seq_len=31), gtflops.profile(model, tokens(5, 31))
    for made in (pickle.loads(pickle.dumps(found)), copy.copy(found), replace(found, notes=("other",))):
        assert made.graph == fresh.graph
        assert made.full_flops == fresh.full_flops
    content = found.to_json()
    assert json.dumps(content["graph"]) == json.dumps(fresh.to_json()["graph"])
    assert content["matmul"] == fresh.to_json()["matmul"]
    assert profile.at(seq_len=29).at(batch_size=5, seq_len=31).full_flops == fresh.full_flops


# --- formulas that are no polynomials -----------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Callable[[Any], None]]:
    """Gives exp, which the model below runs, a price."""
    before = dict(_registered)

    def register(formula: Any) -> None:
        operators.register_flops("aten::exp", replace=True)(formula)

    yield register
    _registered.clear()
    _registered.update(before)


class Exponential(torch.nn.Linear):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids[..., None].float()).exp().sum()


def exponential() -> tuple[Callable[[int], Profile], Profile]:
    """Fresh profiles by length, and one that has been traced from 5 to 99 positions."""
    model = Exponential(1, 2)

    def fresh(length: int) -> Profile:
        return gtflops.profile(model, torch.ones(3, length, dtype=torch.int64), lambda y, _: y)

    profile = fresh(17)
    for length in (5, 99):
        profile.at(seq_len=length)
    return fresh, profile


def windowed(call: Any) -> int:
    return int(min(call.shape(0)[1], 40))


def parity(call: Any) -> int:
    return int(call.shape(0)[1] % 2)


def by_type(call: Any) -> int:
    """Nothing is raised where the length is a polynomial."""
    length = call.shape(0)[1]
    return length * 7 if isinstance(length, int) else 5


def logarithmic(call: Any) -> int:
    return int(call.shape(0)[1].bit_length())


@pytest.mark.parametrize("formula", [windowed, parity, by_type, logarithmic])
def test_formulas_that_are_no_polynomials_are_run_on_integers(registered: Any, formula: Callable[[Any], int]) -> None:
    registered(formula)
    fresh, profile = exponential()
    for length in (23, 39, 41, 55, 67):
        found = profile.at(seq_len=length)
        assert "interpolated" in found.notes[-1]
        assert is_built(found)
        assert found.full_flops == fresh(length).full_flops
        assert (found.prices == fresh(length).prices).all()


def test_a_price_that_is_registered_later_is_that_of_later_profiles(registered: Any) -> None:
    fresh, profile = exponential()
    before = profile.at(seq_len=23)
    assert not is_built(before)
    flops, prices = before.full_flops, fresh(23).prices
    registered(lambda call: 1000 * call.shape(0)[1])
    after = profile.at(seq_len=23)
    assert after.full_flops == fresh(23).full_flops == flops - 3 * 23 * 2 + 1000 * 23  # exp was 1 for each element
    assert before.full_flops == flops
    assert (before.prices == prices).all()


def test_costs_beyond_64_bits_are_refused() -> None:
    _, profile = exponential()
    step = profile.at(seq_len=23)._step  # type: ignore[attr-defined]
    family: Family = step.family
    tariff = Tariff.of(family, profile.names, profile.needed_by)
    assert tariff is not None
    assert tariff.at({"batch_size": 3, "seq_len": 10**12}) is not None
    assert tariff.at({"batch_size": 3, "seq_len": 10**19}) is None
    graph = family.at({"batch_size": 3, "seq_len": 10**19})
    assert graph is not None
    with pytest.raises(gtflops.InputError, match="more than 64 bits can hold"):
        Profile.from_graph(graph)
