"""Times of operators. None is compared with another but where one does thousands of times the work."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch

import gtflops
from gtflops import Profile, timing
from gtflops.capture.dispatch import OperatorMode, describe_call
from gtflops.graph import GETITEM, Graph, Node, Phase
from gtflops.operators import Call
from gtflops.profiling import TIMED
from real_steps import shapes_of
from small_models import build, padded_batch
from zoo import ZOO


@pytest.fixture(scope="module")
def profile() -> Profile:
    return gtflops.profile(build("opt"), padded_batch())


@pytest.fixture(scope="module")
def timed(profile: Profile) -> Profile:
    return gtflops.measure_time(profile)


@pytest.fixture
def each_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without warm-ups and rounds; by a clock on which everything takes 1 ns."""

    def clock(run: Callable[[], Any], device: torch.device) -> int:
        run()
        return 1

    monkeypatch.setattr(timing, "_nanoseconds", clock)


def runs(node: Node) -> bool:
    return node.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE) and node.call.op != GETITEM


class Executed(OperatorMode):
    """Operators that ran, with the types of what went in and came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[Any] = set()

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.calls.add(types_of(describe_call(func, args, kwargs, result)))


def types_of(call: Call) -> Any:
    outputs = tuple(output for output in call.outputs if output is None or output.dtype != "uint8")  # as shapes_of
    return call.op, shapes_of(call), outputs


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.usefixtures("each_runs_once")
def test_every_operator_of_every_model_runs_on_its_types(name: str) -> None:
    """What runs takes and gives tensors of the types in the graph, so that no index or mask is another's."""
    case = ZOO[name]()
    profile = gtflops.profile(case.model, case.batch, case.loss)
    with Executed() as executed:
        times = gtflops.measure_time(profile).nanoseconds
    assert times is not None
    for node, nanoseconds in zip(profile.graph.nodes, times, strict=True):
        if runs(node):
            assert nanoseconds > 0
            in_place_view = node.call.op == "aten.transpose_.default"  # described by what it leaves
            assert in_place_view or types_of(node.call) in executed.calls
        elif node.call.op != GETITEM:
            assert nanoseconds == 0


def test_equal_calls_share_a_time(timed: Profile) -> None:
    times: dict[Call, set[int]] = {}
    for node, nanoseconds in zip(timed.graph.nodes, timed.nanoseconds, strict=True):
        if runs(node):
            times.setdefault(node.call, set()).add(int(nanoseconds))
    assert all(len(found) == 1 for found in times.values())
    assert len(times) < sum(map(runs, timed.graph.nodes))


def test_more_work_takes_longer() -> None:
    """Products of 16 x 16 x 16 and of 1024 x 1024 x 1024: 262,144 times the work."""
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 1024), torch.nn.Linear(1024, 1024, bias=False)
    )
    timed = gtflops.measure_time(gtflops.profile(model, torch.ones(1024, 16), lambda y, _: y.sum()))
    products = [
        (node.call.output.numel * node.call.shape(0)[1], nanoseconds)
        for node, nanoseconds in zip(timed.graph.nodes, timed.nanoseconds, strict=True)
        if node.call.op == "aten.mm.default"
    ]
    assert min(products)[1] < max(products)[1]


def test_the_sum_is_over_what_the_selection_executes(timed: Profile) -> None:
    digraph = timed.graph.to_networkx()
    for names in ([], list(timed.names), list(timed.names[3:9]), list(timed.names[-1:])):
        gradients = [timed.graph.gradients[name] for name in names]
        needed = set(gradients).union(*(networkx.ancestors(digraph, gradient) for gradient in gradients))
        executed = [
            node.phase is Phase.FORWARD or (index in needed and node.phase is Phase.BACKWARD)
            for index, node in enumerate(timed.graph.nodes)
        ]
        assert timed.step_seconds(names) == timed.nanoseconds[executed].sum() / 1e9
        assert timed.step_seconds(timed.mask(names)) == timed.step_seconds(names)
    assert timed.step_seconds("none") == timed.step_seconds([])
    assert timed.step_seconds("all") == timed.step_seconds(timed.names)
    assert 0 < timed.step_seconds("none") < timed.step_seconds(timed.names[3:9]) < timed.step_seconds("all")


def test_outputs_have_times_of_their_own_where_a_mask_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which an operator takes 10 ns, and 100 more for each tensor that it gives."""

    def clock(run: Callable[[], Any], device: torch.device) -> int:
        result = run()
        outputs = result if isinstance(result, tuple) else (result,)
        return 10 + 100 * sum(output is not None for output in outputs)

    monkeypatch.setattr(timing, "_nanoseconds", clock)
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3, bias=False), torch.nn.Conv1d(3, 4, 3))
    timed = gtflops.measure_time(gtflops.profile(model, torch.ones(2, 2, 9), lambda y, _: y.sum()))
    assert timed.nanoseconds is not None
    times = timed.nanoseconds.tolist()
    second, first = (
        i for i, node in enumerate(timed.graph.nodes) if node.call.op == "aten.convolution_backward.default"
    )
    picked = {
        (node.inputs[0], node.call.args[0]): times[index]
        for index, node in enumerate(timed.graph.nodes)
        if node.call.op == GETITEM
    }
    assert (times[second], times[first]) == (10, 110)  # the first makes the gradient of its weight, and no other
    assert picked == {(second, 0): 100, (second, 1): 100, (second, 2): 100, (first, 1): 0}
    one, two = timed.step_seconds(["1.weight"]), timed.step_seconds(["1.weight", "1.bias"])
    assert two - one == pytest.approx(100e-9)
    assert timed.step_seconds("all") - two == pytest.approx(210e-9)  # the first, and the gradient on the way to it


# --- what is left as it was -----------------------------------------------------------------------------------------


def test_the_profile_and_all_generators_are_left_as_they_were(profile: Profile) -> None:
    """The model drops units out, so that operators draw random numbers."""
    assert any("bernoulli" in node.call.op for node in profile.graph.nodes)
    before, notes = torch.get_rng_state(), profile.notes
    with torch.no_grad():
        timed = gtflops.measure_time(profile)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert (profile.nanoseconds, profile.notes) == (None, notes)
    assert repr(timed) == repr(profile)
    assert timed.nanoseconds is not None
    assert not timed.nanoseconds.flags.writeable


def test_the_note_says_where_and_stays_single(timed: Profile) -> None:
    again = gtflops.measure_time(timed)
    (note,) = (note for note in again.notes if note.startswith(TIMED))
    assert note.startswith(f"{TIMED}on cpu, 1 thread, torch {torch.__version__}: ")
    assert len(again.notes) == len(timed.notes)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_on_an_accelerator(profile: Profile) -> None:
    kind = torch.accelerator.current_accelerator().type
    state = torch.get_device_module(kind).get_rng_state()
    timed = gtflops.measure_time(profile, kind)
    assert f"on {kind}:" in timed.notes[-1]
    assert timed.step_seconds("all") > timed.step_seconds("none") > 0
    assert torch.equal(torch.get_device_module(kind).get_rng_state(), state)


# --- files and other shapes -----------------------------------------------------------------------------------------


def test_times_are_saved(timed: Profile, tmp_path: Path) -> None:
    timed.save(tmp_path / "timed.json")
    loaded = Profile.load(tmp_path / "timed.json")
    assert loaded.nanoseconds is not None
    assert loaded.nanoseconds.dtype == np.int64
    assert (loaded.nanoseconds == timed.nanoseconds).all()
    assert not loaded.nanoseconds.flags.writeable
    assert loaded.notes == timed.notes
    assert loaded.step_seconds(timed.names[3:9]) == timed.step_seconds(timed.names[3:9])


@pytest.mark.usefixtures("each_runs_once")
def test_a_profile_from_a_file_is_enough(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "untimed.json")
    loaded = Profile.load(tmp_path / "untimed.json")
    assert loaded.nanoseconds is None
    assert gtflops.measure_time(loaded).step_seconds("all") > 0


@pytest.mark.parametrize(
    "times",
    [[1], [1.5] * 10, [-1] * 10, [2**62] * 10, [2**70] + [0] * 9, "x" * 10, 3],
    ids=lambda times: str(times)[:12],
)
def test_times_that_do_not_fit_their_graph(times: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = gtflops.profile(torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1), lambda y, _: y)
    assert len(profile.graph.nodes) == 10
    monkeypatch.setattr("gtflops.profiling._digest", lambda content: "the same")
    profile.save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**data, "nanoseconds": times}))
    with pytest.raises(gtflops.SavedFileError, match="damaged"):
        Profile.load(tmp_path / "p.json")


@pytest.mark.usefixtures("each_runs_once")
def test_other_shapes_have_no_times(tmp_path: Path) -> None:
    timed = gtflops.measure_time(gtflops.profile("facebook/opt-125m", batch_size=1, seq_len=4))
    assert timed.at(seq_len=4).nanoseconds is not None
    timed.save(tmp_path / "timed.json")
    other = Profile.load(tmp_path / "timed.json").at(seq_len=5)
    assert other.nanoseconds is None
    assert not any(note.startswith(TIMED) for note in other.notes)
    assert "times were of another shape and are left out: gtflops.measure_time(profile, device)" in other.notes
    assert not any("times" in note for note in other.at(seq_len=6).notes)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "tpu", "cuda:99", "", None, 3.5, "cpu:x"])
def test_devices_that_are_not_there(profile: Profile, device: Any) -> None:
    with pytest.raises(gtflops.InputError, match=r"^device is .*, expected one of cpu"):
        gtflops.measure_time(profile, device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
@pytest.mark.usefixtures("each_runs_once")
def test_names_of_the_cpu(profile: Profile, device: Any) -> None:
    assert "on cpu, " in gtflops.measure_time(profile, device).notes[-1]


def test_what_is_no_profile() -> None:
    with pytest.raises(gtflops.InputError, match=r"profile is 'opt', expected what gtflops\.profile returns"):
        gtflops.measure_time("opt")  # type: ignore[arg-type]


def test_a_profile_without_times(profile: Profile) -> None:
    with pytest.raises(gtflops.InputError, match=r"has no times: gtflops\.measure_time\(profile, device\)"):
        profile.step_seconds("all")


def with_operator(profile: Profile, op: str, *args: Any) -> Profile:
    """The first product as another operator."""
    nodes = list(profile.graph.nodes)
    at = next(index for index, node in enumerate(nodes) if node.call.op == "aten.mm.default")
    nodes[at] = replace(nodes[at], call=replace(nodes[at].call, op=op, args=(*nodes[at].call.args, *args)))
    graph: Graph = replace(profile.graph, nodes=tuple(nodes))
    return replace(profile, graph=graph)


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        ("absent.product.default", (), "AttributeError: "),
        ("aten.mm.absent", (), "AttributeError: "),
        ("aten.mv.default", (), "RuntimeError: vector "),
        ("aten.relu.default", (), "IndexError: "),
        ("aten", (), "ValueError: "),
        ("aten.mm.__class__", (), "AttributeError: "),
        ("aten.cudnn_batch_norm_backward.default", (1,) * 7, "ValueError: reserveSpace must be what a library left"),
    ],
)
@pytest.mark.usefixtures("each_runs_once")
def test_operators_that_do_not_run_are_named(op: str, args: tuple[int, ...], reason: str) -> None:
    profile = gtflops.profile(torch.nn.Linear(3, 3, bias=False), torch.ones(2, 3), lambda y, _: y.sum())
    broken = with_operator(profile, op, *args)
    with pytest.raises(gtflops.UnsupportedOperatorError, match=rf"(?s){op} \({reason}.*allow_unsupported=True"):
        gtflops.measure_time(broken)
    timed = gtflops.measure_time(broken, allow_unsupported=True)
    assert f"counted as 0, since they do not run by themselves: {op} (" in timed.notes[-1]
    unknown = [node.call.op == op for node in timed.graph.nodes]
    assert timed.nanoseconds is not None
    assert sum(unknown) >= 1
    assert not timed.nanoseconds[unknown].any()
    assert timed.step_seconds("all") > 0
