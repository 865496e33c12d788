"""Profile: definitions of METHOD, queries, files."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch

import gtflops
from gtflops import Profile
from gtflops.graph import Graph, Phase
from small_models import HalfUsed, build, padded_batch
from zoo import ZOO


@pytest.fixture(scope="module")
def profile() -> Profile:
    return gtflops.profile(build("llama-tied"), padded_batch())


@pytest.fixture
def saved(profile: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "llama.profile.json"
    profile.save(path)
    return path


def closure(profile: Profile, name: str) -> set[int]:
    """Backward nodes that a tensor's gradient depends on, by networkx."""
    digraph = profile.graph.to_networkx()
    gradient = profile.graph.gradients[name]
    return {
        index
        for index in networkx.ancestors(digraph, gradient) | {gradient}
        if profile.graph.nodes[index].phase is Phase.BACKWARD
    }


def test_backward_order_dw_and_dy_are_those_of_the_definitions(profile: Profile) -> None:
    closures = {name: closure(profile, name) for name in profile.names}
    cost = profile.prices.sum(axis=0)
    needed_before: set[int] = set()
    for position, tensor in enumerate(profile.tensors):
        others = set().union(*(closures[name] for name in profile.names if name != tensor.name))
        own = closures[tensor.name] - others
        assert tensor.dw_flops == cost[list(own)].sum() == profile.t_dw[position]
        added = closures[tensor.name] - own - needed_before
        assert tensor.dy_flops == cost[list(added)].sum() == profile.t_dy[position]
        needed_before |= closures[tensor.name]
    gradients = [profile.graph.gradients[name] for name in profile.names]
    assert gradients == sorted(gradients)


def test_backward_order_is_not_that_of_named_parameters(profile: Profile) -> None:
    """The final norm is next to the loss, although it is registered after all layers; the tied embedding is last."""
    assert profile.names[0] == "model.norm.weight"
    assert profile.names[-1] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in profile.names


def test_forms_of_a_selection(profile: Profile) -> None:
    model = build("llama-tied")
    names = [name for name in profile.names if "mlp" in name]
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in names)
    by_names = profile.step_flops(names)
    assert by_names == profile.step_flops(model) == profile.step_flops(profile.mask(names))
    assert by_names == profile.step_flops(reversed(names))
    assert profile.step_flops("none").total == profile.forward_flops
    assert profile.step_flops("all").total == profile.full_flops
    assert profile.step_flops([]).backward == 0


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (["model.norm.wight"], "no tensor 'model.norm.wight'; nearest: model.norm.weight"),
        ("some", "trainable is 'some'"),
        (None, "trainable is None"),
        (np.zeros(3, dtype=bool), r"shape \(3,\), expected bool and"),
        (np.zeros(29, dtype=int), "dtype int64"),
    ],
)
def test_selections_that_do_not_fit(profile: Profile, trainable: Any, message: str) -> None:
    with pytest.raises(gtflops.InputError, match=message):
        profile.step_flops(trainable)


def test_unused_tensors_cost_nothing_and_are_noted() -> None:
    profile = gtflops.profile(HalfUsed(), torch.ones(2, 3), lambda y, _: y)
    assert profile.names[-2:] == ("unused.weight", "unused.bias")
    assert profile.step_flops(["unused.weight"]).backward == 0
    assert "the loss does not depend on 2 tensors, first unused.weight" in profile.notes


def test_integer_parameters_are_not_trained() -> None:
    model = torch.nn.Linear(3, 3)
    model.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    profile = gtflops.profile(model, torch.ones(2, 3), lambda y, _: y.sum())
    assert set(profile.names) == {"weight", "bias"}


def test_very_deep_graphs() -> None:
    """Nothing recurses over the graph."""

    class Deep(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3000):
                x = x + super().forward(x)
            return x.sum()

    profile = gtflops.profile(Deep(2, 2), torch.ones(1, 2), lambda y, _: y)
    # The weight and the bias need every activation gradient but the first product's.
    step = profile.step_flops("all", ops="matmul")
    assert (step.forward, step.backward) == (3000 * 8, 3000 * 8 + 2999 * 8)


# --- files ------------------------------------------------------------------------------------------------------


def test_save_and_load(profile: Profile, saved: Path) -> None:
    loaded = Profile.load(saved)
    assert loaded.graph == profile.graph
    assert loaded.tensors == profile.tensors
    assert (loaded.prices == profile.prices).all()
    assert (loaded.notes, loaded.versions, loaded.unsupported) == (profile.notes, profile.versions, profile.unsupported)
    names = profile.names[3:9]
    assert loaded.step_flops(names) == profile.step_flops(names)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_infinities_in_arguments_survive() -> None:
    class Masked(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(x > 0, float("-inf")).softmax(-1).sum()

    graph = gtflops.profile(Masked(3, 3), torch.ones(2, 3), lambda y, _: y).graph
    text = json.dumps(graph.to_json(), allow_nan=False)
    assert Graph.from_json(json.loads(text)) == graph


def test_loading_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys, gtflops; profile = gtflops.Profile.load(sys.argv[1]);"
        "selection = gtflops.select(profile, {tensor.name: 1.0 for tensor in profile.tensors}, budget=0.7);"
        "assert selection.flops <= 0.7 * profile.full_flops;"
        "loaded = {'torch', 'transformers', 'networkx'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code, saved], check=True)


def test_a_truncated_file(saved: Path) -> None:
    text = saved.read_text()
    for damaged in (*(text[:length] for length in (0, 1, len(text) // 2, len(text) - 1)), "[" * 200_000):
        saved.write_text(damaged)
        with pytest.raises(gtflops.SavedFileError, match="cut off"):
            Profile.load(saved)


def test_another_version(saved: Path) -> None:
    data = json.loads(saved.read_text())
    saved.write_text(json.dumps({**data, "version": 99, "versions": []}))
    with pytest.raises(gtflops.SavedFileError, match="version 99 of the profile format, this gtflops reads version 3"):
        Profile.load(saved)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"format": "other"}'])
def test_something_else(saved: Path, text: str) -> None:
    saved.write_text(text)
    with pytest.raises(gtflops.SavedFileError, match="no gtflops profile"):
        Profile.load(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("graph"),
        lambda data: data["matmul"].pop(),
        lambda data: data["matmul"].__setitem__(0, -1),
        lambda data: data["matmul"].__setitem__(0, 2**70),
        lambda data: data["other"].__setitem__(0, "x"),
        lambda data: data["graph"]["nodes"][50].__setitem__(2, [60]),
        lambda data: data["graph"]["nodes"][50].__setitem__(1, 10**6),
        lambda data: data["graph"].__setitem__("loss", 10**6),
        lambda data: data["graph"]["gradients"].__setitem__("model.norm.weight", 10**6),
        lambda data: data["graph"]["calls"][0].pop(),
        lambda data: data.__setitem__("notes", 3),
        lambda data: data["unsupported"].append(["x"]),
        lambda data: data["graph"]["gradients"].__setitem__("absent", 3),
        lambda data: data["matmul"].__setitem__(-1, 1),
        lambda data: data["matmul"].__setitem__(-1, 2**62),
        lambda data: data["graph"].__setitem__("loss", None),
        lambda data: data.__setitem__("versions", []),
        lambda data: data.pop("digest"),
    ],
)
def test_a_damaged_file(saved: Path, damage: Any) -> None:
    data = json.loads(saved.read_text())
    damage(data)
    saved.write_text(json.dumps(data))
    with pytest.raises(gtflops.SavedFileError, match="damaged"):
        Profile.load(saved)


def test_files_that_cannot_be_read_or_written(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(gtflops.InputError, match="cannot read"):
        Profile.load(tmp_path / "absent.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(gtflops.SavedFileError, match="no text"):
        Profile.load(tmp_path / "binary")
    with pytest.raises(gtflops.InputError, match="cannot write"):
        profile.save(tmp_path / "absent" / "x.json")


def test_a_failed_write_keeps_the_old_file(profile: Profile, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(gtflops.InputError, match="No space left on device"):
        profile.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("ops", ["all", "matmul"])
@pytest.mark.parametrize("name", ["llama-eager", "llama-checkpointed-with-input-gradients"])
def test_many_selections_at_once_are_those_one_by_one(name: str, ops: Any) -> None:
    case = ZOO[name]()
    profile = gtflops.profile(case.model, case.batch)
    masks = np.random.default_rng(3).random((20, len(profile.names))) < 0.3
    masks[0] = False
    many = profile.step_flops_of_many(masks, ops=ops)
    one_by_one = [profile.step_flops(mask, ops=ops) for mask in masks]
    assert many.tolist() == [[step.forward, step.backward, step.recompute] for step in one_by_one]
    assert profile.step_flops_of_many(masks[:0]).shape == (0, 3)


def test_masks_of_another_shape_are_refused() -> None:
    profile = gtflops.profile(build("opt"), padded_batch())
    for masks in (np.ones((2, 3), dtype=bool), np.ones((2, len(profile.names))), [[True]], np.ones(3, dtype=bool)):
        with pytest.raises(gtflops.InputError, match=r"expected a bool array of shape \(selections, "):
            profile.step_flops_of_many(masks)  # type: ignore[arg-type]


def test_tables_by_operator_and_module_add_up() -> None:
    case = ZOO["llama-sdpa-checkpointed"]()
    profile = gtflops.profile(case.model, case.batch)
    for names in (profile.names, profile.names[:3], profile.names[-1:]):
        step = profile.step_flops(names)
        by_operator = profile.by_operator(names).values()
        assert step.forward == sum(row.forward for row in by_operator)
        assert step.backward == sum(row.backward for row in by_operator)
        assert step.recompute == sum(row.recompute for row in by_operator) > 0
        by_module = profile.by_module(names)
        assert by_module[""] == step
        assert next(iter(by_module)) == ""
        layers = [by_module[f"model.layers.{layer}"] for layer in range(3)]
        assert sum(layer.total for layer in layers) == by_module["model.layers"].total
    head = profile.by_module("all", ops="matmul")["lm_head"]
    numel = profile.tensors[profile.names.index("lm_head.weight")].numel
    assert (head.forward, head.backward) == (2 * 3 * 12 * numel, 2 * 2 * 3 * 12 * numel)


def test_the_graph_keeps_lines_dtypes_and_memory() -> None:
    profile = gtflops.profile(build("llama"), padded_batch())
    digraph = profile.graph.to_networkx()
    rotary = [node for node in profile.graph.nodes if node.call.op == "aten.cos.default"]
    assert all("modeling_llama.py:" in node.source and node.module == "model.rotary_emb" for node in rotary)
    assert rotary
    product = next(index for index, node in enumerate(profile.graph.nodes) if node.call.op == "aten.mm.default")
    attributes = digraph.nodes[product]
    assert attributes["source"] == profile.graph.nodes[product].source
    assert attributes["outputs"][0].dtype == "float32"
    backward = [node for node in profile.graph.nodes if node.phase == "backward" and node.module.endswith("q_proj")]
    assert {node.source for node in backward} <= {
        node.source for node in profile.graph.nodes if node.phase == "forward"
    }
    for node in profile.graph.nodes:
        if node.storage is not None and node.call.op == "aten.mm.default":
            assert profile.graph.storage_bytes[node.storage] == 4 * node.call.output.numel


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed")
def test_memory_of_a_large_model() -> None:
    """Llama-2-70B, 138 GB of weights in bfloat16, is profiled in less than 1.5 GB."""
    code = (
        "import resource, gtflops\n"
        "profile = gtflops.profile('meta-llama/Llama-2-70b', batch_size=4, seq_len=512)\n"
        "print(profile.full_flops, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    full_flops, kibibytes = map(int, printed.split()[-2:])
    assert full_flops > 3 * 2 * 4 * 512 * 68e9
    assert kibibytes < 1.5 * 2**20


def test_costs_beyond_64_bits_are_refused() -> None:
    with pytest.raises(gtflops.InputError, match=r"more than 64 bits can hold .* expected a smaller batch"):
        gtflops.profile("facebook/opt-125m", batch_size=20_000_000, seq_len=2048)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["matmul"].pop(),
        lambda data: data["matmul"].__setitem__(3, -1),
        lambda data: data["other"].__setitem__(3, 1.5),
        lambda data: data["graph"]["gradients"].__setitem__("unknown", 3),
        lambda data: data["graph"].__setitem__("loss", None),
        lambda data: data["graph"].__setitem__("loss", 3.0),
        lambda data: data["graph"]["nodes"][5].__setitem__(1, -1),
        lambda data: data["graph"]["kept"].append([10**9, [0]]),
    ],
)
def test_files_of_a_foreign_writer_are_checked(saved: Path, change: Any) -> None:
    """With a right digest, and content that no profile has."""
    from gtflops.profiling import _digest

    data = json.loads(saved.read_text())
    change(data)
    content = {key: value for key, value in data.items() if key not in ("format", "version", "digest")}
    saved.write_text(json.dumps({**data, "digest": _digest(content)}))
    with pytest.raises(gtflops.SavedFileError, match="damaged"):
        Profile.load(saved)
