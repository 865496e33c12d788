"""What else than weights and inputs computes activations: any change of it is another prefix, and nothing else is."""

import datetime
import enum
import functools
import logging
import os
import re
import subprocess
import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from transformers.models.llama import modeling_llama

from gtflops.reuse import ActivationStore, Prefix
from test_reuse_prefix import FAMILIES, reusing

SCALE = 1.0


@dataclass
class Inner:
    scale: float = 1.0


@dataclass
class Config:
    scale: float = 1.0
    inner: Inner = field(default_factory=Inner)


class Options:
    __slots__ = ("__scale",)

    def __init__(self, scale: float) -> None:
        self.__scale = scale

    @property
    def scale(self) -> float:
        return self.__scale


class Times:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.self = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def __mul__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x**3


def helper(x: torch.Tensor) -> torch.Tensor:
    return helped(x) * SCALE


def helped(x: torch.Tensor, factor: float = 1.0, *, further: float = 1.0) -> torch.Tensor:
    return x * factor * further


def threefold(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x * 3.0


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


class Base(torch.nn.Module):
    factor = 1.0

    @property
    def width(self) -> float:
        return 1.0

    def of_base(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor * self.width

    def report(self) -> str:
        return "of no effect"


class Block(Base):
    def __init__(self, others: Any = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.config = Config()
        self.options = Options(1.0)
        self.freqs = torch.ones(4)
        self.array = np.ones(4, dtype=np.float32)
        self.table = {"a": [Inner()]}
        self.mode = Mode.PLAIN
        self.namespace = types.SimpleNamespace(scale=1.0)
        self.act = times(1.0)
        self.times = Times()
        self.bound = Times().__call__
        self.part = functools.partial(helped, factor=1.0)
        self.hidden = [torch.nn.Linear(4, 4).requires_grad_(False)]
        self.others = others
        self.dtype = torch.float32
        self.names = {"b", "a", "c"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) * self.config.scale * self.config.inner.scale * self.options.scale * self.freqs
        x = x * torch.from_numpy(self.array) * self.table["a"][0].scale * self.mode.value * self.namespace.scale
        x = self.hidden[0](self.part(self.bound(self.times * self.times(self.act(x)))))
        x = functional.gelu(self.of_base(helper(x)))
        return Cubed.apply(x).to(self.dtype).to(torch.float32)  # type: ignore[no-any-return, no-untyped-call]


def model_of() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model


Patch = pytest.MonkeyPatch


def set_linear(block: Block, patch: Patch) -> None:
    block.linear = torch.nn.Linear(4, 4).requires_grad_(False)


def set_hidden(block: Block, patch: Patch) -> None:
    block.hidden[0].weight.mul_(3)


CHANGES: dict[str, Callable[[Block, Patch], Any]] = {
    "dataclass": lambda block, patch: setattr(block.config, "scale", 3.0),
    "dataclass in it": lambda block, patch: setattr(block.config.inner, "scale", 3.0),
    "slots": lambda block, patch: setattr(block, "options", Options(3.0)),
    "private slot": lambda block, patch: setattr(block.options, "_Options__scale", 3.0),
    "tensor": lambda block, patch: setattr(block, "freqs", torch.full((4,), 3.0)),
    "tensor in place": lambda block, patch: block.freqs.mul_(3),
    "tensor through .data": lambda block, patch: block.freqs.data.mul_(3),
    "array in place": lambda block, patch: block.array.__setitem__(2, 3.0),
    "object in containers": lambda block, patch: setattr(block.table["a"][0], "scale", 3.0),
    "enum": lambda block, patch: setattr(block, "mode", Mode.DOUBLE),
    "namespace": lambda block, patch: setattr(block.namespace, "scale", 3.0),
    "dtype": lambda block, patch: setattr(block, "dtype", torch.bfloat16),
    "closure": lambda block, patch: setattr(block, "act", times(3.0)),
    "object that is called": lambda block, patch: setattr(block.times, "factor", 3.0),
    "object of a bound method": lambda block, patch: setattr(block, "bound", Times(3.0).__call__),
    "partial": lambda block, patch: setattr(block, "part", functools.partial(helped, factor=3.0)),
    "code of an operator": lambda block, patch: patch.setattr(Times, "__mul__", lambda self, x: x * 3.0),
    "forward": lambda block, patch: patch.setattr(Block, "forward", lambda self, x: self.linear(x) * 3),
    "forward of the object": lambda block, patch: setattr(block, "forward", lambda x: x * 3),
    "method of a base": lambda block, patch: patch.setattr(Base, "of_base", lambda self, x: x * 3),
    "property": lambda block, patch: patch.setattr(Base, "width", property(lambda self: 3.0)),
    "class attribute": lambda block, patch: patch.setattr(Base, "factor", 3.0),
    "global function": lambda block, patch: patch.setitem(globals(), "helper", threefold),
    "global function of another": lambda block, patch: patch.setitem(globals(), "helped", threefold),
    "global number": lambda block, patch: patch.setitem(globals(), "SCALE", 3.0),
    "default": lambda block, patch: patch.setattr(helped, "__defaults__", (3.0,)),
    "keyword default": lambda block, patch: patch.setattr(helped, "__kwdefaults__", {"further": 3.0}),
    "code in place": lambda block, patch: patch.setattr(helper, "__code__", threefold.__code__),
    "autograd function": lambda block, patch: patch.setattr(Cubed, "forward", staticmethod(lambda ctx, x: x**2)),
    "function of torch": lambda block, patch: patch.setattr(functional, "gelu", threefold),
    "class of torch": lambda block, patch: patch.setattr(torch.nn.Linear, "forward", lambda self, x: x * 3),
    "weights that are not registered": set_hidden,
    "submodule": set_linear,
}


def run(prefix: Prefix) -> tuple[bool, float]:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    with prefix.for_batch((x,)) as reused:
        return reused, prefix.model(x).sum().item()


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store")


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_stored_before_a_change_is_not_used(change: str, store: ActivationStore, monkeypatch: Patch) -> None:
    model = model_of()
    prefix = Prefix(model, ["0"], store)
    first, again = run(prefix), run(prefix)
    assert (first[0], *again) == (False, True, first[1])
    with torch.no_grad():
        CHANGES[change](model[0], monkeypatch)
    expected = model(torch.linspace(-1, 1, 12).reshape(3, 4)).sum().item()
    assert expected != first[1], "the change is one"
    assert run(prefix) == (False, expected)
    assert run(prefix) == (True, expected)
    other = Prefix(model, ["0"], store)
    assert [run(other)[1] for _ in range(2)] == [expected, expected]


@pytest.mark.parametrize("name", ["of_base", "report"])
def test_code_that_finds_names_at_run_time_reaches_all(name: str, store: ActivationStore, monkeypatch: Patch) -> None:
    class Finding(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = getattr(self, "".join(["of", "_", "base"]))(x)
            return found

    prefix = Prefix(torch.nn.Sequential(Finding(), torch.nn.Linear(4, 1)), ["0"], store)
    assert [run(prefix)[0] for _ in range(2)] == [False, True]
    monkeypatch.setattr(Base, name, lambda self, x: x * 3)
    assert [run(prefix)[0] for _ in range(2)] == [False, True]


def test_what_has_no_effect_is_no_change(store: ActivationStore, monkeypatch: Patch) -> None:
    """What is trained above too, also where the block refers to it; and equal values of another model."""

    def trained() -> Any:
        model = model_of()
        model[0].others = [model[1], model[1].weight, {"whole": model}]
        return model

    model = trained()
    prefix = Prefix(model, ["0"], store)
    run(prefix)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        assert run(prefix)[0]
    model.eval()
    assert run(prefix)[0]
    monkeypatch.setattr(Base, "report", lambda self: "changed")
    other = trained()
    other[0].names = {"c", "b", "a"}
    other[0].namespace = types.SimpleNamespace(scale=1.0)
    known = Prefix(other, ["0"], store)
    known.load_state_dict(prefix.state_dict())
    assert run(known)[0]


@pytest.mark.parametrize(
    "value", [threading.Lock(), torch.Generator(), np.random.default_rng()], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_read_is_said_and_serves_one_object(value: Any, store: ActivationStore) -> None:
    def made() -> Prefix:
        model = model_of()
        model[0].config.inner.other = value
        return Prefix(model, ["0"], store)

    prefix = made()
    with pytest.warns(UserWarning, match=rf"a Inner has a \S*{type(value).__name__}, which cannot be compared"):
        assert not run(prefix)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(prefix)[0]
    other = made()
    other.load_state_dict(prefix.state_dict())
    with pytest.warns(UserWarning, match="the activations that are stored serve this run alone"):
        assert not run(other)[0]
    prefix.model[0].config.inner.other = threading.Lock()
    with pytest.warns(UserWarning, match="lock, which cannot be compared"):
        assert not run(prefix)[0]


def test_of_a_model_around_the_blocks_what_its_code_names(store: ActivationStore) -> None:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
            self.blocks[0].requires_grad_(False)
            self.optimizer = torch.optim.AdamW(self.blocks[1].parameters())
            self.config = Config()
            self.num_steps = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](self.scaled(x)))  # type: ignore[no-any-return]

        def scaled(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.config.scale

        def step(self) -> None:
            self(torch.ones(4)).sum().backward()
            self.optimizer.step()
            self.num_steps += 1

    model = Whole()
    prefix = Prefix(model, ["blocks.0"], store)
    run(prefix)
    for _ in range(2):
        model.step()
        assert run(prefix)[0]
    model.config.scale = 3.0
    assert not run(prefix)[0]


HELD: dict[str, Callable[[], Any]] = {
    "logger": lambda: logging.getLogger("held"),
    "path": lambda: Path("a") / "b",
    "pattern": lambda: re.compile("a+"),
    "collections": lambda: [OrderedDict(a=1), defaultdict(list, {1: [2]}), deque([1]), Counter("aab"), {"a", 1, (2,)}],
    "date": lambda: datetime.date(2026, 11, 22),
    "mapping": lambda: types.MappingProxyType({1: 2}),
    "tensors": lambda: [torch.ones(2, dtype=torch.complex64), torch.ones(0), torch.ones((), device="meta")],
    "numpy": lambda: [np.float32(3), np.ones((2, 2))[:, 1], np.array([1, None], dtype=object), np.dtype("int8")],
    "torch": lambda: [torch, torch.Size([1]), torch.device("cpu"), torch.ops.aten.relu.default, torch.relu, int],
    "functions": lambda: ["a".join, functional.relu, functools.lru_cache(helper), torch.no_grad()(helper)],
}


@pytest.mark.parametrize("held", HELD)
def test_what_is_held_is_read_and_is_the_same_again(held: str, store: ActivationStore) -> None:
    def made() -> Prefix:
        model = model_of()
        model[0].others = HELD[held]()
        return Prefix(model, ["0"], store)

    first, second = made(), made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(first)
        second.load_state_dict(first.state_dict())
        assert run(second)[0]


def test_objects_without_end(store: ActivationStore) -> None:
    model = model_of()
    inner = model[0].config.inner
    for _ in range(3000):
        inner.scale, inner.further = 1.0, Inner()
        inner = inner.further
    prefix = Prefix(model, ["0"], store)
    with pytest.warns(UserWarning, match="cannot be compared"):
        run(prefix)
    assert run(prefix)[0]


def digest_of(prefix: Prefix) -> str:
    (front,) = prefix._fronts.values()
    return prefix._digest(front)


@pytest.mark.parametrize("family", FAMILIES)
def test_running_a_model_changes_nothing(family: str, store: ActivationStore) -> None:
    """So that a run that is resumed finds in its first pass what was stored; without a warning."""
    torch.manual_seed(0)
    model, blocks, batch = FAMILIES[family]()
    first = Prefix(model, blocks, store)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be compared")
        reusing(first, batch)
    torch.manual_seed(0)
    model, blocks, batch = FAMILIES[family]()
    second = Prefix(model, blocks, store)
    second.load_state_dict(first.state_dict())
    assert reusing(second, batch)[0]
    assert digest_of(second) == digest_of(first)


def rotated(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return k, q


CHANGES_OF_LIBRARIES: dict[str, Callable[[Patch], None]] = {
    "version": lambda patch: patch.setattr(sys.modules["transformers"], "__version__", "99.0"),
    "method": lambda patch: patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x),
    "function": lambda patch: patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated),
    "function of a function": lambda patch: patch.setattr(modeling_llama, "rotate_half", threefold),
    "attention": lambda patch: patch.setitem(
        transformers.AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: (args[1], None)
    ),
    "version of torch": lambda patch: patch.setattr(torch, "__version__", "99.0"),
}


@pytest.mark.parametrize("change", CHANGES_OF_LIBRARIES)
def test_changes_of_libraries(change: str, store: ActivationStore, monkeypatch: Patch) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    model.set_attn_implementation("sdpa")
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    before = digest_of(prefix)
    CHANGES_OF_LIBRARIES[change](monkeypatch)
    assert digest_of(prefix) != before
    monkeypatch.undo()
    assert digest_of(prefix) == before


def print_digests() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (None, *FAMILIES):
            torch.manual_seed(0)
            model, blocks, batch = (model_of(), ["0"], None) if name is None else FAMILIES[name]()
            prefix = Prefix(model, blocks, ActivationStore(sys.argv[1]))
            run(prefix) if batch is None else reusing(prefix, batch)
            print(name, digest_of(prefix), flush=True)


@pytest.mark.slow
def test_other_processes_read_the_same(tmp_path: Path) -> None:
    """Of any seed for hashes."""
    code = "import test_reuse_settings; test_reuse_settings.print_digests()"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) == 1 + len(FAMILIES)
