"""What of the forward pass is constant, without regard to blocks, and the least that has to be stored of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves

import gtflops
from gtflops.capture.dispatch import OperatorMode
from gtflops.constant import ConstantPart, constant_part
from gtflops.graph import GETITEM, Graph, Node, Phase
from gtflops.operators import Call, TensorType
from real_steps import raw_loss
from small_models import VOCABULARY, build, padded_batch
from zoo import ZOO, Case


def summed(outputs: Any, batch: Any) -> torch.Tensor:
    return outputs.sum()


def part_of(model: torch.nn.Module, batch: Any, trained: list[str]) -> ConstantPart:
    """By execution too."""
    profile = gtflops.profile(model, batch, loss=summed)
    return check_by_execution(Case(model, batch, summed), trained, profile)


def places(part: ConstantPart) -> list[tuple[str, tuple[int, ...], int]]:
    return [(tensor.module, tensor.shape, tensor.num_bytes) for tensor in part.stored]


# --- against every cut ------------------------------------------------------------------------------------------


def random_graph(draw: np.random.Generator) -> tuple[Graph, np.ndarray]:
    """A batch, a trained tensor, up to 9 constant operators, some views or dear, and others that read them."""

    def made(name: str, op: str, inputs: tuple[int, ...], phase: Phase, size: int, storage: int) -> Node:
        return Node(name, Call(op, (), (), (TensorType((size,), "uint8"),)), inputs, phase, "", "", storage)

    nodes = [
        made("x", "batch", (), Phase.BATCH, 1, 0),
        made("w", "parameter", (), Phase.PARAMETER, 1, 1),
    ]
    storage_bytes, prices = [1, 1], [(0, 0), (0, 0)]
    for _ in range(draw.integers(3, 10)):
        inputs = tuple({int(source) for source in draw.choice([i for i in range(len(nodes)) if i != 1], 2)})
        storage, size = len(storage_bytes), int(draw.integers(1, 9))
        view_of = nodes[inputs[0]]
        if len(inputs) == 1 and view_of.phase is Phase.FORWARD and draw.random() < 0.5:
            storage, size = view_of.storage or 0, int(draw.integers(1, view_of.call.output.numel + 1))
        else:
            storage_bytes.append(size)
        nodes.append(made(f"n{len(nodes)}", "aten.op.default", inputs, Phase.FORWARD, size, storage))
        prices.append((100, 1) if draw.random() < 0.4 else (0, int(draw.integers(0, 3))))
    constants = range(2, len(nodes))
    for phase in (Phase.FORWARD, Phase.FORWARD, Phase.BACKWARD):
        inputs = (1, *(int(source) for source in draw.choice(constants, 2)))
        nodes.append(made(f"v{len(nodes)}", "aten.mm.default", inputs, phase, 3, len(storage_bytes)))
        storage_bytes.append(3)
        prices.append((100, 0))
    graph = Graph("random", tuple(nodes), {"w": len(nodes) - 1}, len(nodes) - 2, (), tuple(storage_bytes), ())
    return graph, np.array(prices, dtype=np.int64).T


@pytest.mark.parametrize("seed", range(80))
def test_no_cut_is_smaller_and_none_as_small_runs_less_again(seed: int) -> None:
    graph, prices = random_graph(np.random.default_rng(seed))
    after = len(graph.nodes) - 1
    part = constant_part(graph, prices, {"w"}, [after])
    constants = [i for i, node in enumerate(graph.nodes) if node.phase is Phase.FORWARD and i < after - 2]
    best = None
    for size in range(len(constants) + 1):
        for chosen in itertools.combinations(constants, size):
            again: set[int] = set()
            stack = [source for reader in (after - 2, after - 1, after) for source in graph.nodes[reader].inputs]
            while stack:
                index = stack.pop()
                if index in constants and index not in chosen and index not in again:
                    again.add(index)
                    stack += graph.nodes[index].inputs
            if not any(prices[0, index] for index in again):
                cost = sum(graph.nodes[i].call.output.numel for i in chosen), int(prices[:, list(again)].sum())
                best = cost if best is None else min(best, cost)
    assert (part.cache_bytes, part.recomputed) == best
    assert part.variable == 200
    assert part.flops + part.recomputed + part.variable == sum(
        int(prices[:, i].sum()) for i, node in enumerate(graph.nodes) if node.phase is Phase.FORWARD
    )


# --- by execution -----------------------------------------------------------------------------------------------


class Replay(OperatorMode):
    """Runs a step in which dear constant operators give NaN, and what is said to be stored is there.

    ``values`` are what a step without that gave for the nodes that are stored, by number of the operator and of the
    output; empty in the step that fills them. What is constant is told from the memory that the real operators use.
    """

    def __init__(
        self,
        profile: gtflops.Profile,
        part: ConstantPart,
        trained: list[torch.Tensor],
        values: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        super().__init__()
        self._nodes = profile.graph.nodes
        self._forward = [
            index for index, node in enumerate(self._nodes) if node.phase is Phase.FORWARD and node.call.op != GETITEM
        ]
        by_name = {node.name: index for index, node in enumerate(self._nodes)}
        number = {index: position for position, index in enumerate(self._forward)}
        self._stored = set()
        for tensor in part.stored:
            node = self._nodes[by_name[tensor.name]]
            if node.call.op == GETITEM:
                self._stored.add((number[node.inputs[0]], node.call.args[0]))
            else:
                self._stored.add((number[by_name[tensor.name]], 0))
        self._matmul = profile.prices[0].tolist()
        self._changing = {tensor.untyped_storage()._cdata for tensor in trained}
        self._values, self._replays, self._number = values, bool(values), 0
        self._alive: list[Any] = []  # so that no memory is used twice
        self.not_run = 0

    def _op(self, number: int) -> str:
        return self._nodes[self._forward[number]].call.op.rsplit(".", 1)[0].replace(".", "::")

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self._number == len(self._forward):
            return  # the backward pass
        # The trace has more views where views are written into: autograd makes them anew.
        while self._op(self._number) != func._schema.name and self._op(self._number) in ("aten::slice", "aten::select"):
            self._number += 1
        number, self._number = self._number, self._number + 1
        node, matmul = self._nodes[self._forward[number]], self._matmul[self._forward[number]]
        assert func._schema.name == self._op(number), number
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
        self._alive += tensors
        if self._changing & {memory_of(value) for value in tree_leaves((args, kwargs))}:
            self._changing |= {memory_of(output) for output in tensors}
        elif self._replays and matmul > 2 * sum(output.numel for output in node.call.outputs if output is not None):
            self.not_run += matmul
            for output in tensors:
                if output.is_floating_point():
                    output.fill_(torch.nan)
        for position, output in enumerate(outputs):
            if (number, position) in self._stored:
                if func._schema.name.endswith("_"):  # of a write in place, all of its memory
                    output = output.new_empty(0).set_(output.untyped_storage())
                if self._replays:
                    output.copy_(self._values[number, position])
                else:
                    self._values[number, position] = output.clone()


def memory_of(value: Any) -> int | None:
    strided = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return value.untyped_storage()._cdata if strided else None


def check_by_execution(case: Case, names: list[str], profile: gtflops.Profile) -> ConstantPart:
    part = profile.constant_part(names)
    for tensor in case.model.parameters():  # as in the trace: some operators are others where a gradient is wanted
        tensor.requires_grad_(tensor.is_floating_point())
    trained = [case.model.get_parameter(name) for name in names]
    values: dict[tuple[int, int], torch.Tensor] = {}
    results = []
    for _ in range(2):
        case.model.zero_grad(set_to_none=True)
        with Replay(profile, part, trained, values) as replay:
            value = raw_loss(case.model, case.batch, case.loss)
            value.backward()
        results.append([value.detach(), *(tensor.grad for tensor in trained)])
    for first, again in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, again)
    assert sum(value.numel() * value.element_size() for value in values.values()) == part.cache_bytes
    assert part.flops + part.recomputed + part.variable == profile.forward_flops
    assert part.flops >= replay.not_run > 0 or not part.stored
    return part


#: Residuals, experts, casts, two streams, fused attention and cells, checkpoints, views of one memory.
MIXED = {
    "checkpointed-blocks",
    "convnext",
    "convolution-transposed",
    "gpt2-sdpa",
    "gru-bidirectional",
    "in-place",
    "llama-tied-autocast",
    "lstm-two-layers",
    "mixtral-batched-eager",
    "multihead-attention-batch-first",
    "resnet-eval",
    "spectral-transform",
    "weight-norm",
}
OTHERS = {*ZOO} - MIXED - {"buffers"}  # a buffer that moves gives another loss in each step


@pytest.mark.parametrize(
    "name", [*sorted(MIXED), *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(OTHERS))]
)
def test_what_is_stored_suffices(name: str) -> None:
    torch.manual_seed(0)
    case = ZOO[name]()
    case.model.eval()
    profile = gtflops.profile(case.model, case.batch, loss=case.loss)
    if profile.graph.always:
        with pytest.raises(gtflops.InputError, match="gradients of tensors that are no parameters"):
            profile.constant_part("none")
        return
    names = [tensor.name for tensor in profile.tensors if tensor.has_gradient]
    draw = np.random.default_rng(0)
    for share in (1, len(names) // 4, len(names) // 2):
        check_by_execution(case, names[: max(1, share)], profile)
        check_by_execution(case, draw.choice(names, max(1, share), replace=False).tolist(), profile)


class Rows(torch.nn.Module):
    """Writes each of its rows into memory that it made, and one once more."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.ModuleList(torch.nn.Linear(5, 4) for _ in range(3))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(x), 3, 4)
        for position, row in enumerate(self.rows):
            rows[:, position].copy_(row(x))
        rows[:, 0].mul_(2)
        return self.head(rows)


def test_a_write_in_place_is_stored_with_all_that_is_in_its_memory() -> None:
    # Not the last write alone, of one row: all three, as they are before or after they are written.
    part = part_of(Rows(), torch.rand(7, 5), ["head.weight"])
    assert part.cache_bytes == 7 * 3 * 4 * 4
    # Where the last of the rows is trained, the other two.
    assert part_of(Rows(), torch.rand(7, 5), ["rows.2.weight", "head.weight"]).cache_bytes == 7 * 2 * 4 * 4


class Overwritten(torch.nn.Module):
    """One column of a product is replaced by that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h[:, 0] = self.second(x)[:, 0]
        return self.head(h)


def test_what_was_there_before_a_write_is_not_stored_besides() -> None:
    assert part_of(Overwritten(), torch.rand(7, 5), ["head.weight"]).cache_bytes == 7 * 4 * 4


# --- closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2"])
def test_at_a_boundary_between_blocks_it_is_the_hidden_state(family: str) -> None:
    model = build(family).eval()
    profile = gtflops.profile(model, padded_batch())
    last = [name for name in profile.names if ".2." in name]
    part, step = profile.constant_part(last), profile.step_flops(last, reuse="prefix")
    assert [tensor.shape for tensor in part.stored] == [(3, 16, 32)]
    assert part.cache_bytes == step.cache_bytes == 3 * 16 * 32 * 4
    assert 0 <= part.flops - step.stored < 0.005 * step.stored  # what stands before the first block


def test_inside_of_a_block_it_is_what_is_read_behind() -> None:
    # Trained queries of the last layer: its keys and values, of 2 heads of 8 each, need not be computed again. The
    # hidden state is needed too, for the queries and the residual.
    profile = gtflops.profile(build("llama").eval(), padded_batch())
    names = ["model.layers.2.self_attn.q_proj.weight"]
    part, step = profile.constant_part(names), profile.step_flops(names, reuse="prefix")
    assert part.cache_bytes == 3 * 16 * (32 + 16 + 16) * 4
    products = 2 * 3 * 16 * 32 * (16 + 16)
    assert products <= part.flops - step.stored < 1.05 * products  # and the keys' rotation
    assert profile.constant_part(["lm_head.weight"]).cache_bytes == 3 * 16 * 32 * 4  # where no block is trained


def test_of_a_frozen_encoder_only_its_output_is_stored() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    profile = gtflops.profile(model, padded_batch())
    decoder = [name for name in profile.names if name.startswith("decoder.")]
    part = profile.constant_part(decoder)
    assert places(part) == [("encoder.final_layer_norm", (3, 16, 32), 3 * 16 * 32 * 4)]


def test_a_narrow_layer_is_stored_and_not_its_wide_output() -> None:
    class Spread(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unsqueeze(-1).expand(*x.shape, 16).flatten(1) + 1

    layers = [torch.nn.Linear(64, 4), torch.nn.ReLU(), Spread(), torch.nn.Linear(64, 8)]
    part = part_of(torch.nn.Sequential(*layers), torch.rand(5, 64), ["3.weight"])
    assert places(part) == [("2", (5, 4, 1), 5 * 4 * 4)]
    assert part.recomputed == 5 * 64  # the addition

    # The slice that is read is less than what it is a view of, and what is cast to half of that again.
    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1].bfloat16().float()

    layers = [torch.nn.Linear(64, 6), Half(), torch.nn.Linear(1, 8)]
    assert places(part_of(torch.nn.Sequential(*layers), torch.rand(5, 64), ["2.weight"])) == [("1", (5, 1), 5 * 2)]


class Rotated(torch.nn.Module):
    """Scaled by angles that an outer product gives, as in rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = torch.nn.Linear(5, 8), torch.nn.Parameter(torch.rand(8))
        self.register_buffer("frequencies", torch.rand(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) * self.scale * (x[:, :1] @ self.get_buffer("frequencies")).cos()


def test_an_outer_product_is_cheap() -> None:
    part = part_of(Rotated(), torch.rand(7, 5), ["scale"])
    assert places(part) == [("first", (7, 8), 7 * 8 * 4)]
    assert part.recomputed == 2 * 7 * 8 + 7 * 8  # the product, and the cosine as one FLOP


class Backbone(torch.nn.Module):
    """Convolutions by hand, without a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head = torch.nn.BatchNorm2d(16), torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.head(self.norm(self.second(x)).relu().mean(dim=(2, 3)))


def test_models_without_blocks() -> None:
    images = torch.rand(2, 3, 8, 8)
    model = Backbone().eval()
    part = part_of(model, images, ["head.weight", "head.bias"])
    assert places(part) == [("", (2, 16), 2 * 16 * 4)]  # pooled
    assert part.recomputed == 0
    profile = gtflops.profile(model, images, loss=summed)
    assert profile.step_flops(["head.weight"], reuse="prefix").blocks == ()
    # Above the first convolution: what is pooled, a fourth of its output.
    assert part_of(model, images, ["second.weight"]).cache_bytes == 2 * 8 * 4 * 4 * 4


def test_batch_statistics_random_numbers_and_state_end_the_constant_part() -> None:
    profile = gtflops.profile(Backbone().train(), torch.rand(2, 3, 8, 8), loss=summed)
    part = profile.constant_part(["head.weight"])
    assert places(part) == [("second", (2, 16, 4, 4), 2 * 16 * 4 * 4 * 4)]  # before the norm

    def stored(dropout: float, training: bool) -> list[tuple[str, tuple[int, ...], int]]:
        layers = [torch.nn.Linear(6, 5), torch.nn.Dropout(dropout), torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)]
        model = torch.nn.Sequential(*layers).train(training)
        return places(gtflops.profile(model, torch.rand(7, 6), loss=summed).constant_part(["3.weight"]))

    assert stored(0.5, True) == [("0", (7, 5), 7 * 5 * 4)]
    assert stored(0.5, False) == stored(0.0, True) == [("2", (7, 4), 7 * 4 * 4)]
    counting = ZOO["buffers"]()
    profile = gtflops.profile(counting.model, counting.batch, loss=counting.loss)
    assert [place[0] for place in places(profile.constant_part(["head.weight"]))] == ["layer"]


def test_dropout_inside_of_fused_attention_ends_it() -> None:
    q = TensorType((2, 4, 8, 16), "float16")

    def constant(dropout: float) -> int:
        call = Call("aten._scaled_dot_product_flash_attention.default", (q, q, q, dropout, True), (), (q,))
        nodes = (
            Node("x", Call("batch", (), (), (q,)), (), Phase.BATCH, "", "", 0),
            Node("attention", call, (0,), Phase.FORWARD, "", "", 1),
        )
        graph = Graph("", nodes, {}, 1, (), (2048, 2048), ())
        return constant_part(graph, np.array([[0, 10**6], [0, 0]]), (), ()).flops

    assert [constant(dropout) for dropout in (0.0, 0.1)] == [10**6, 0]


def test_a_tensor_at_the_input_leaves_nothing() -> None:
    profile = gtflops.profile(build("llama-tied").eval(), padded_batch())
    part = profile.constant_part(["model.embed_tokens.weight"])
    assert (part.flops, part.stored) == (0, ())
    assert profile.constant_part("all") == profile.constant_part(["model.embed_tokens.weight", *profile.names])
    nothing_trained = profile.constant_part("none")
    assert (nothing_trained.variable, nothing_trained.cache_bytes) == (0, 4)  # the loss
    with pytest.raises(gtflops.InputError, match="has no tensor 'head'"):
        profile.constant_part(["head"])


def test_what_only_writes_and_returns_nothing_is_not_constant() -> None:
    x = TensorType((4,), "float32")

    def node(name: str, op: str, inputs: tuple[int, ...], outputs: tuple[TensorType, ...], phase: Phase) -> Node:
        return Node(name, Call(op, (), (), outputs), inputs, phase, "", "", 0 if outputs else None)

    nodes = (
        node("x", "aten.zeros.default", (), (x,), Phase.FORWARD),
        node("write", "mine.product_.default", (0,), (), Phase.FORWARD),
        node("read", "aten.mean.default", (0, 1), (x,), Phase.FORWARD),
    )
    graph = Graph("", nodes, {}, 2, (), (16,), ())
    part = constant_part(graph, np.array([[0, 10**6, 0], [0, 0, 3]]), (), ())
    assert (part.flops, part.variable) == (0, 10**6 + 3)


def test_training_one_use_of_a_tied_embedding_moves_the_others() -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.ones(2, 4, dtype=torch.int64)}
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    separate = gtflops.profile(model, batch, uses="separate").constant_part(["lm_head.weight"])
    assert separate.flops == gtflops.profile(model, batch).constant_part(["model.embed_tokens.weight"]).flops == 0
    assert separate.stored == ()
