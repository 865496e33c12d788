"""Profile.at: every shape from one profile, equal to the integer to a fresh trace."""

import copy
import gc
import json
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import gtflops
from gtflops import InputError, Profile
from gtflops.capture.resizing import layout_of
from gtflops.graph import Graph, Node, Phase
from gtflops.operators import Call, TensorType
from gtflops.shapes import Family, Sizes, basis, lattice

VOCABULARY = 97
_MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TWO_LAYERS = {**_MODERN, "num_hidden_layers": 2}  # which see a window and everything in turn
_CLASSIC = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_BART = {
    f"{part}_{name}": number for part in ("encoder", "decoder") for name, number in [("layers", 1), ("ffn_dim", 48)]
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_MODERN),
    "mistral": lambda: transformers.MistralConfig(**_MODERN, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_MODERN),
    "qwen3": lambda: transformers.Qwen3Config(**_MODERN, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_TWO_LAYERS, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_TWO_LAYERS, head_dim=8, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_CLASSIC),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ),
    "phi": lambda: transformers.PhiConfig(**_CLASSIC),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4),
    "mixtral": lambda: transformers.MixtralConfig(
        **_MODERN, num_local_experts=4, sliding_window=None, experts_implementation="batched_mm"
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4),
    "bert": lambda: transformers.BertConfig(**_CLASSIC, max_position_embeddings=64),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        **_BART,
    ),
}
ENCODER_DECODERS = ("t5", "bart")


def build(family: str, attention: str = "eager") -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    if family in ENCODER_DECODERS:
        auto = transformers.AutoModelForSeq2SeqLM
    elif family == "bert":
        auto = transformers.AutoModelForMaskedLM
    return auto.from_config(CONFIGS[family](), attn_implementation=attention).train()


def tokens(batch_size: int, seq_len: int, decoder_len: int | None = None, *, padded: bool = True) -> dict[str, Any]:
    """A batch of these sizes; with padding, the last row has some."""
    ids = torch.randint(3, VOCABULARY, (batch_size, seq_len))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -1] = 0
    labels = torch.randint(3, VOCABULARY, (batch_size, decoder_len or seq_len))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same(found: Profile, fresh: Profile) -> None:
    assert found.graph == fresh.graph
    assert (found.prices == fresh.prices).all()
    assert found.names == fresh.names
    assert (found.t_dw == fresh.t_dw).all()
    assert (found.t_dy == fresh.t_dy).all()
    assert found.forward_flops == fresh.forward_flops
    assert found.unsupported == fresh.unsupported
    draw = random.Random(3)
    for _ in range(3):
        names = draw.sample(found.names, draw.randint(1, len(found.names)))
        for ops in ("all", "matmul"):
            assert found.step_flops(names, ops=ops) == fresh.step_flops(names, ops=ops)
    assert set(fresh.notes) <= set(found.notes)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Grows by one with every trace of a profile."""
    from gtflops.capture import trace

    seen: list[Any] = []

    def counted(*args: Any) -> Any:
        seen.append(args)
        return trace(*args)

    monkeypatch.setattr("gtflops.capture.trace", counted)
    return seen


# --- the promise ------------------------------------------------------------------------------------------------


LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "gemma2")


@pytest.mark.parametrize(
    ("family", "attention", "padded"),
    [
        pytest.param(family, "eager", True, marks=[pytest.mark.slow] if family in LIKE_LLAMA else [])
        for family in CONFIGS
        if family not in (*ENCODER_DECODERS, "mamba")
    ]
    + [("llama", "sdpa", True), ("mistral", "sdpa", False), ("gpt2", "sdpa", True), ("bert", "eager", False)],
)
def test_ten_random_shapes_without_a_trace(family: str, attention: str, padded: bool, traces: list[Any]) -> None:
    """Two shapes span the region; inside of it no shape is traced, and each equals a fresh trace."""
    model = build(family, attention)
    profile = gtflops.profile(model, tokens(3, 17, padded=padded))
    for corner in ({"batch_size": 2, "seq_len": 9}, {"batch_size": 8, "seq_len": 60}):
        assert_same(profile.at(**corner), gtflops.profile(model, tokens(**corner, padded=padded)))
    assert len(traces) <= 1 + 2 + 2 + 5  # the profile; two shapes and their fresh ones; the rest of 6 and the check
    profile.at(batch_size=5, seq_len=32)  # multiples of 32 are trusted from here on
    draw = random.Random(family)
    for _ in range(10):
        shape = {"batch_size": draw.randint(2, 8), "seq_len": draw.randint(10, 60)}
        before = len(traces)
        found = profile.at(**shape)
        assert len(traces) == before
        assert "interpolated" in found.notes[-1]
        assert_same(found, gtflops.profile(model, tokens(**shape, padded=padded)))


SLOW_T5, SLOW_BART = (pytest.param(family, "eager", marks=pytest.mark.slow) for family in ("t5", "bart"))


@pytest.mark.parametrize(("family", "attention"), [SLOW_T5, SLOW_BART, ("bart", "sdpa")])
def test_encoder_and_decoder_have_lengths_of_their_own(family: str, attention: str, traces: list[Any]) -> None:
    model = build(family, attention)
    profile = gtflops.profile(model, tokens(3, 17, 11))
    for corner in ((2, 9, 5), (8, 48, 32)):
        sizes = dict(zip(("batch_size", "seq_len", "decoder_len"), corner, strict=True))
        assert_same(profile.at(**sizes), gtflops.profile(model, tokens(*corner)))
    assert len(traces) <= 1 + 2 + 2 + 12
    draw = random.Random(family)
    for position in range(10):
        shape = {name: draw.randint(9, 31) for name in ("seq_len", "decoder_len")}
        if position == 0:
            shape["decoder_len"] = shape["seq_len"]
        shape["batch_size"] = draw.randint(2, 7)
        before = len(traces)
        found = profile.at(**shape)
        assert len(traces) == before + (position == 0)  # lengths that are equal are traced the first time
        assert_same(found, gtflops.profile(model, tokens(**shape)))


def test_a_graph_that_changes_with_the_length_is_traced(traces: list[Any]) -> None:
    model = build("mamba")
    profile = gtflops.profile(model, tokens(3, 7))
    draw = random.Random(5)
    for _ in range(10):
        shape = {"batch_size": draw.randint(1, 5), "seq_len": draw.randint(1, 9)}
        assert_same(profile.at(**shape), gtflops.profile(model, tokens(**shape)))
    assert "changes with the shape" in profile.at(batch_size=4, seq_len=10).notes[-1]
    profile.at(batch_size=8), profile.at(batch_size=6)
    before = len(traces)
    wide = profile.at(batch_size=5)  # with the batch alone it does not change
    assert len(traces) == before
    assert_same(wide, gtflops.profile(model, tokens(5, 7)))


def test_sizes_of_one(traces: list[Any]) -> None:
    """They have a family of their own: PyTorch folds and broadcasts them."""
    model = build("llama")
    profile = gtflops.profile(model, tokens(3, 17))
    for seq_len in (12, 40, 31, 23):
        assert_same(profile.at(batch_size=1, seq_len=seq_len), gtflops.profile(model, tokens(1, seq_len)))
    before = len(traces)
    assert "interpolated" in profile.at(batch_size=1, seq_len=19).notes[-1]
    assert len(traces) == before
    for batch_size in (2, 4, 1):
        assert_same(profile.at(batch_size=batch_size, seq_len=1), gtflops.profile(model, tokens(batch_size, 1)))
    from_one = gtflops.profile(model, tokens(1, 1))
    for batch_size, seq_len in ((1, 9), (3, 1), (4, 8), (6, 16), (5, 12)):
        fresh = gtflops.profile(model, tokens(batch_size, seq_len))
        assert_same(from_one.at(batch_size=batch_size, seq_len=seq_len), fresh)
    row = gtflops.profile(model, tokens(1, 12))
    before = len(traces)
    row.at(batch_size=3), row.at(batch_size=8)
    assert_same(row.at(batch_size=6), gtflops.profile(model, tokens(6, 12)))
    assert len(traces) == before + 2 + 1 + 1 + 1  # two, the profiled one again, the check; the fresh one


def test_by_name(traces: list[Any]) -> None:
    profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=64)
    for seq_len in (256, 96):
        profile.at(seq_len=seq_len)
    assert len(traces) == 4
    found = profile.at(seq_len=200)
    assert len(traces) == 4
    assert_same(found, gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=200))
    assert_same(found.at(seq_len=64), profile)
    with pytest.raises(InputError, match="beyond the 2048 positions"):
        profile.at(seq_len=4096)


def test_an_encoder_decoder_by_name() -> None:
    profile = gtflops.profile("google/flan-t5-small", batch_size=2, seq_len=12)
    fresh = gtflops.profile("google/flan-t5-small", batch_size=2, seq_len=12, decoder_len=5)
    assert_same(profile.at(decoder_len=5), fresh)
    assert fresh.forward_flops < profile.forward_flops
    with pytest.raises(InputError, match="no encoder-decoder"):
        gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=12, decoder_len=5)
    with pytest.raises(InputError, match="decoder_len is 0"):
        gtflops.profile("google/flan-t5-small", batch_size=2, seq_len=12, decoder_len=0)


def test_what_is_not_given_stays_and_results_can_be_asked_again(traces: list[Any]) -> None:
    model = build("gpt2")
    profile = gtflops.profile(model, tokens(3, 17))
    wide = profile.at(batch_size=5)
    assert_same(wide.at(seq_len=20), gtflops.profile(model, tokens(5, 20)))
    assert wide.at(batch_size=5, seq_len=17) is wide
    assert profile.at() is profile
    before = len(traces)
    assert_same(wide.at(batch_size=3), profile)
    assert_same(profile.at(batch_size=5), wide)  # remembered
    assert len(traces) == before


def test_outside_of_the_region_one_trace_widens_it(traces: list[Any]) -> None:
    model = build("gpt2")
    profile = gtflops.profile(model, tokens(3, 17))
    profile.at(seq_len=20), profile.at(seq_len=30)
    before = len(traces)
    profile.at(seq_len=60)
    assert len(traces) == before + 1
    profile.at(seq_len=50)
    assert len(traces) == before + 1


# --- where the step is not the same for all shapes --------------------------------------------------------------


class Rounded(torch.nn.Linear):
    """Pads its length to a multiple of 8."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ids[..., None].float().expand(*ids.shape, self.in_features)
        x = torch.nn.functional.pad(x, (0, 0, 0, -ids.shape[1] % 8))
        return super().forward(x).sum()


class Window(torch.nn.Linear):
    """Looks at 20 positions at most."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ids[..., None].float().expand(*ids.shape, self.in_features)
        return super().forward(x[:, -20:]).sum()


class Cubic(torch.nn.Linear):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        return super().forward(torch.ones(length**3, self.in_features) + ids.sum()).sum()


@pytest.mark.parametrize("module", [Rounded, Window, Cubic])
def test_sizes_that_are_no_polynomials_are_found_out(module: type[torch.nn.Linear]) -> None:
    model = module(3, 3)
    profile = gtflops.profile(model, torch.ones(2, 5, dtype=torch.int64), lambda y, _: y)
    for seq_len in (17, 33, 9, 16, 24, 30, 19, 21, 40, 12):
        fresh = gtflops.profile(model, torch.ones(2, seq_len, dtype=torch.int64), lambda y, _: y)
        assert_same(profile.at(seq_len=seq_len), fresh)
    assert "changes with the shape" in profile.at(seq_len=27).notes[-1]


class Aligned(torch.nn.Linear):
    """Takes another path for multiples of 8."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids[..., None].float().expand(*ids.shape, self.in_features))
        return (x.relu() if ids.shape[1] % 8 == 0 else x).sum()


def test_aligned_sizes_are_not_taken_for_others(traces: list[Any]) -> None:
    model = Aligned(3, 3)
    profile = gtflops.profile(model, torch.ones(2, 5, dtype=torch.int64), lambda y, _: y)
    for seq_len in (99, 41, 37, 48, 40, 72, 36):
        fresh = gtflops.profile(model, torch.ones(2, seq_len, dtype=torch.int64), lambda y, _: y)
        assert_same(profile.at(seq_len=seq_len), fresh)
    before = len(traces)
    assert "interpolated" in profile.at(seq_len=91).notes[-1]
    assert len(traces) == before


@pytest.mark.parametrize("asked", [(64, 40), (20, 64)])
def test_the_greatest_length_may_be_special(asked: tuple[int, int], traces: list[Any]) -> None:
    """BERT does not cut a buffer of positions that is used whole; other lengths are interpolated all the same."""
    model = build("bert")
    profile = gtflops.profile(model, tokens(3, 17))
    for seq_len in asked:
        assert_same(profile.at(seq_len=seq_len), gtflops.profile(model, tokens(3, seq_len)))
    before = len(traces)
    assert_same(profile.at(seq_len=19), gtflops.profile(model, tokens(3, 19)))
    assert len(traces) == before + 1
    whole = gtflops.profile(model, tokens(3, 64))
    for seq_len in (40, 20, 33, 50):
        assert_same(whole.at(seq_len=seq_len), gtflops.profile(model, tokens(3, seq_len)))
    assert "interpolated" in whole.at(seq_len=35).notes[-1]


def test_a_threshold_outside_of_the_region_keeps_the_family(traces: list[Any]) -> None:
    model = Window(3, 3)
    profile = gtflops.profile(model, torch.ones(2, 5, dtype=torch.int64), lambda y, _: y)
    profile.at(seq_len=9), profile.at(seq_len=19)
    assert "changes with the shape" in profile.at(seq_len=50).notes[-1]
    before = len(traces)
    assert "interpolated" in profile.at(seq_len=15).notes[-1]
    assert len(traces) == before


class Even(torch.nn.Linear):
    """Refuses a length that is odd."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ids.view(ids.shape[0], 2, ids.shape[1] // 2, 1).float().expand(-1, -1, -1, self.in_features)
        return super().forward(x).sum()


def test_a_shape_that_nobody_asked_for_may_be_refused() -> None:
    model = Even(3, 3)
    profile = gtflops.profile(model, torch.ones(2, 6, dtype=torch.int64), lambda y, _: y)
    for seq_len in (8, 12, 20, 10):
        fresh = gtflops.profile(model, torch.ones(2, seq_len, dtype=torch.int64), lambda y, _: y)
        assert_same(profile.at(seq_len=seq_len), fresh)
    with pytest.raises(InputError, match="refused the batch"):
        profile.at(seq_len=9)


# --- the model and the batch ------------------------------------------------------------------------------------


def test_model_and_batch_are_left_as_they_were() -> None:
    model, batch = build("opt"), tokens(3, 17)
    parameters = copy.deepcopy(model.state_dict())
    values = {name: tensor.clone() for name, tensor in batch.items()}
    profile = gtflops.profile(model, batch)
    model.eval()
    state = torch.get_rng_state()
    found = profile.at(seq_len=20)
    profile.at(batch_size=4, seq_len=12), profile.at(batch_size=5, seq_len=30)
    assert not any(module.training for module in model.modules())
    assert (torch.get_rng_state() == state).all()
    assert all((tensor == values[name]).all() for name, tensor in batch.items())
    assert all((tensor == parameters[name]).all() for name, tensor in model.state_dict().items())
    assert_same(found, gtflops.profile(model.train(), tokens(3, 20)))  # traced in the mode that was profiled


def test_another_precision_around_is_found_out() -> None:
    model = build("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        profile = gtflops.profile(model, tokens(3, 17))
    with pytest.raises(InputError, match="other settings"):
        profile.at(seq_len=20)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(profile.at(seq_len=20), gtflops.profile(model, tokens(3, 20)))


def test_a_model_that_is_gone_or_another() -> None:
    model = build("gpt2")
    profile = gtflops.profile(model, tokens(3, 17))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(InputError, match="no longer the model that was profiled"):
        profile.at(seq_len=20)
    model.config._attn_implementation = "eager"
    assert profile.at(seq_len=20).full_flops > profile.full_flops
    model.more = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="modules by now"):
        profile.at(seq_len=21)
    del model
    gc.collect()
    with pytest.raises(InputError, match="GPT2LMHeadModel that was profiled is gone"):
        profile.at(seq_len=21)
    assert profile.at(seq_len=20).full_flops > profile.full_flops  # remembered


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected a positive integer"),
        ({"seq_len": 2.5}, "seq_len is 2.5, expected a positive integer"),
        ({"seq_len": True}, "seq_len is True"),
        (
            {"decoder_len": 4},
            "decoder_len is 4, but the batch that was profiled has none; it has batch_size 3, seq_len",
        ),
        ({"seq_len": 65}, "refused the batch|beyond"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, Any], message: str) -> None:
    class Limited(torch.nn.Linear):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] > 64:
                raise ValueError("too long")
            return super().forward(ids[..., None].float()).sum()

    model = Limited(1, 2)
    profile = gtflops.profile(model, torch.ones(3, 17, dtype=torch.int64), lambda y, _: y)
    with pytest.raises(InputError, match=message):
        profile.at(**sizes)


# --- resizing batches -------------------------------------------------------------------------------------------


def resized_shapes(batch: Any, sizes: Sizes, *, has_decoder: bool = False) -> dict[str, tuple[int, ...]]:
    resized = layout_of(batch, has_decoder=has_decoder).resized(sizes)
    return {name: tuple(tensor.shape) for name, tensor in resized.items() if isinstance(tensor, torch.Tensor)}


def test_which_dimensions_are_sizes() -> None:
    ids = torch.ones(4, 16, dtype=torch.int64)
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(16)[None],
        "cache_position": torch.arange(16),
        "attention_mask": torch.ones(4, 1, 16, 16),
        "inputs_embeds": torch.ones(4, 16, 16),
        "pixel_values": torch.ones(4, 3, 16, 16),
        "labels": ids,
        "scale": torch.tensor(2.0),
        "return_dict": True,
    }
    assert layout_of(batch, has_decoder=False).sizes == Sizes(4, 16)
    assert resized_shapes(batch, Sizes(5, 7)) == {
        "input_ids": (5, 7),
        "position_ids": (1, 7),
        "cache_position": (7,),
        "attention_mask": (5, 1, 7, 7),
        "inputs_embeds": (5, 7, 16),
        "pixel_values": (5, 3, 16, 16),
        "labels": (5, 7),
        "scale": (),
    }


def test_sizes_that_are_equal_are_told_apart_by_names() -> None:
    ids = torch.ones(8, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ids, "labels": ids}
    assert layout_of(batch, has_decoder=True).sizes == Sizes(8, 8, 8)
    assert resized_shapes(batch, Sizes(3, 4, 5), has_decoder=True) == {
        "input_ids": (3, 4),
        "attention_mask": (3, 4),
        "decoder_input_ids": (3, 5),
        "labels": (3, 5),
    }
    classes = {"input_ids": ids, "labels": torch.ones(8, dtype=torch.int64)}
    assert resized_shapes(classes, Sizes(3, 4))["labels"] == (3,)
    speech = {"input_features": torch.ones(2, 80, 30), "labels": torch.ones(2, 30, dtype=torch.int64)}
    assert layout_of(speech, has_decoder=True).sizes == Sizes(2, None, 30)
    assert resized_shapes(speech, Sizes(3, None, 5), has_decoder=True) == {
        "input_features": (3, 80, 30),
        "labels": (3, 5),
    }


@pytest.mark.parametrize(
    ("batch", "sizes", "message"),
    [
        ({"input_ids": (8, 8), "weights": (8,)}, Sizes(4, 8), "'weights'.*equal to the batch size and to seq_len"),
        ({"input_ids": (4, 16), "patches": (12, 3)}, Sizes(5, 16), "'patches'.*not the batch size 4, nor 1"),
        ({"input_ids": (4, 16), "states": (4, 2, 16)}, Sizes(4, 8), "'states'.*equal to seq_len, perhaps by chance"),
        ({"input_ids": (4, 9), "decoder_input_ids": (4, 9), "x": (4, 9)}, Sizes(4, 8, 9), "'x'.*as long as both"),
        ({"input_ids": (4, 1), "mask": (4, 1, 1, 1)}, Sizes(4, 8), "'mask'.*by chance"),
    ],
)
def test_sizes_that_cannot_be_told_are_refused_when_they_change(batch: Any, sizes: Sizes, message: str) -> None:
    made = {
        name: torch.ones(shape, dtype=torch.int64 if name.endswith("ids") else torch.float32)
        for name, shape in batch.items()
    }
    layout = layout_of(made, has_decoder=False)
    with pytest.raises(InputError, match=message):
        layout.resized(sizes)
    layout.resized(layout.sizes)


def test_numbers_in_a_batch() -> None:
    ids = torch.ones(4, 6, dtype=torch.int64)
    layout = layout_of({"input_ids": ids, "length": 6, "flag": True, "chunk": 5}, has_decoder=False)
    assert layout.resized(Sizes(8, 6))["length"] == 6
    with pytest.raises(InputError, match=r"number \['length'\] is equal to it"):
        layout.resized(Sizes(8, 7))


def test_batches_of_other_kinds() -> None:
    ids = torch.ones(4, 6, dtype=torch.int64)
    assert layout_of(ids, has_decoder=False).resized(Sizes(2, 3)).shape == (2, 3)
    features, labels = layout_of((torch.ones(4, 5), torch.ones(4)), has_decoder=False).resized(Sizes(2))
    assert (features.shape, labels.shape) == ((2, 5), (2,))
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": ids})
    assert resized_shapes(encoding, Sizes(2, 3)) == {"input_ids": (2, 3), "attention_mask": (2, 3)}
    with FakeTensorMode():
        fake = torch.ones(4, 6, dtype=torch.int64)
    resized = layout_of(fake, has_decoder=False).resized(Sizes(9, 3))
    assert (type(resized), resized.shape) == (type(fake), (9, 3))
    meta = layout_of(ids.to("meta"), has_decoder=False).resized(Sizes(9, 3))
    assert (meta.is_meta, meta.shape) == (True, (9, 3))
    with pytest.raises(InputError, match="no tensors with a dimension"):
        layout_of((3, torch.tensor(2)), has_decoder=False)
    with pytest.raises(InputError, match="expected strided"):
        layout_of(torch.ones(4, 6).to_sparse(), has_decoder=False).resized(Sizes(2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("sizes", [Sizes(2, 16), Sizes(9, 50), Sizes(3, 5), Sizes(2, 2)])
def test_padding_stays_padding(dtype: torch.dtype, row: int, sizes: Sizes) -> None:
    ids, mask = torch.ones(3, 16, dtype=torch.int64), torch.ones(3, 16).to(dtype)
    batch = {"input_ids": ids, "attention_mask": mask}
    assert layout_of(batch, has_decoder=False).resized(sizes)["attention_mask"].all()
    mask[row, 7:9] = 0
    resized = layout_of(batch, has_decoder=False).resized(sizes)["attention_mask"]
    assert resized.any()
    assert not resized.all()


def test_memory_formats_stay() -> None:
    whole = torch.ones(4, 9, 6, dtype=torch.int64)
    for tensor, fresh in [
        (whole[:, :-1], torch.ones(5, 8, 6, dtype=torch.int64)[:, :-1]),
        (whole[:, 1:, 0], torch.ones(5, 8, 6, dtype=torch.int64)[:, 1:, 0]),
        (whole.transpose(1, 2)[:, 0], torch.ones(5, 7, 6, dtype=torch.int64).transpose(1, 2)[:, 0]),
        (torch.ones(1, 8, dtype=torch.int64).expand(4, 8), torch.ones(1, 7, dtype=torch.int64).expand(5, 7)),
        (torch.ones(8, 4, dtype=torch.int64).T, torch.ones(7, 5, dtype=torch.int64).T),
    ]:
        resized = layout_of(tensor, has_decoder=False).resized(Sizes(5, 7))
        assert (resized.shape, resized.stride()) == (fresh.shape, fresh.stride())
    images = torch.ones(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert layout_of(images, has_decoder=False).resized(Sizes(6)).is_contiguous(memory_format=torch.channels_last)


# --- files ------------------------------------------------------------------------------------------------------


def test_a_loaded_profile_by_name_traces_again(tmp_path: Path) -> None:
    profile = gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=16).at(seq_len=24)
    profile.save(tmp_path / "named.json")
    loaded = Profile.load(tmp_path / "named.json")
    assert loaded.notes == profile.notes
    found = loaded.at(batch_size=3)
    assert_same(found, gtflops.profile("facebook/opt-125m", batch_size=3, seq_len=24))
    assert sum("seq_len" in note for note in found.notes) == 1
    code = (
        "import sys, gtflops; p = gtflops.Profile.load(sys.argv[1]); assert p.at(seq_len=24) is p;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "named.json"], check=True)


def test_other_loaded_and_copied_profiles_say_what_to_do(tmp_path: Path) -> None:
    model = build("gpt2")
    profile = gtflops.profile(model, tokens(2, 6))
    profile.save(tmp_path / "live.json")
    for other in (Profile.load(tmp_path / "live.json"), pickle.loads(pickle.dumps(profile))):
        assert other.full_flops == profile.full_flops
        with pytest.raises(InputError, match="profile it again"):
            other.at(seq_len=8)
    old = replace(profile, versions={"gtflops": "0.0.1"})
    with pytest.raises(InputError, match=r"made by \{'gtflops': '0"):
        old.at(seq_len=8)


def test_a_damaged_name(tmp_path: Path) -> None:
    path = tmp_path / "named.json"
    gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=16).save(path)
    from gtflops.profiling import _digest

    for damage in ({"name": 3}, {"attention": "x"}, {"sizes": ["2", 8, None]}, {"sizes": [None, 8, None]}):
        data = json.loads(path.read_text())
        data["named"].update(damage)
        data["digest"] = _digest({key: data[key] for key in data if key not in ("format", "version", "digest")})
        (tmp_path / "damaged.json").write_text(json.dumps(data))
        with pytest.raises(gtflops.SavedFileError, match="damaged"):
            Profile.load(tmp_path / "damaged.json")


# --- the fitting alone ------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(2, 10**6), min_size=3, max_size=3, unique=True)
FREE = st.sampled_from(
    [
        ("batch_size",),
        ("seq_len",),
        ("batch_size", "seq_len"),
        ("seq_len", "decoder_len"),
        ("batch_size", "seq_len", "decoder_len"),
    ]
)


def graph_of(integers: tuple[int, ...], op: str = "aten.x.default", argument: Any = 0.5) -> Graph:
    """Two nodes with these integers in a shape, in an argument and in a list."""
    shape = TensorType(integers, "float32")
    call = Call(op, (shape, integers[0], (integers[-1], True, None), argument), (("k", integers[0]),), (shape, None))
    free = Call("aten.y.default", (), (), (TensorType((3,), "int64"),))
    nodes = (Node("a", free, (), Phase.BATCH, "", "", 0), Node("b", call, (0,), Phase.FORWARD, "m", "m.py:1", 1))
    return Graph("Model", nodes, {"w": 1, "v": None}, 1, (), (3, integers[0]), ((0, (1,)),))


@given(FREE, st.data())
def test_polynomials_are_fitted_exactly(free: tuple[str, ...], data: st.DataObject) -> None:
    """Of any coefficients, halves included (n(n - 1)/2), without overflow."""
    nodes = {name: data.draw(LENGTHS) for name in free}
    coefficients = [
        data.draw(st.lists(st.integers(-(10**20), 10**20), min_size=len(basis(free)), max_size=len(basis(free))))
        for _ in range(3)
    ]

    def values(point: dict[str, int]) -> tuple[int, ...]:
        return tuple(
            sum(
                c * math.prod(point[name] ** power for name, power in zip(free, powers, strict=True))
                for c, powers in zip(row, basis(free), strict=True)
            )
            for row in coefficients
        )

    points = lattice(free, nodes)
    assert len({tuple(point.items()) for point in points}) == len(basis(free))
    family = Family.fit(free, points, [graph_of(values(point)) for point in points])
    assert family is not None
    elsewhere = {name: data.draw(st.integers(1, 10**6)) for name in free}
    assert family.at(elsewhere) == graph_of(values(elsewhere))
    for point in points:
        assert family.at(point) == graph_of(values(point))


@given(st.lists(st.integers(2, 2000), min_size=4, max_size=4, unique=True))
def test_what_is_no_polynomial_is_found_out(lengths: list[int]) -> None:
    """A cubic, and lengths rounded up to 16, where the check is not in the same stretch of one."""
    *nodes, check = lengths
    points = lattice(("seq_len",), {"seq_len": nodes})

    def family(of: Callable[[int], int]) -> Family:
        fitted = Family.fit(("seq_len",), points, [graph_of((of(point["seq_len"]),)) for point in points])
        assert fitted is not None
        return fitted

    assert family(lambda s: s**3).at({"seq_len": check}) != graph_of((check**3,))
    assert family(lambda s: 2**s).at({"seq_len": check}) != graph_of((2**check,))
    halves = family(lambda s: s * (s - 1) // 2).at({"seq_len": check})
    assert halves == graph_of((check * (check - 1) // 2,))


def test_a_value_between_integers_is_no_value() -> None:
    points = lattice(("batch_size",), {"batch_size": (3, 6)})
    small = Family.fit(("batch_size",), points, [graph_of((0,)), graph_of((1,))])
    large = Family.fit(("batch_size",), points, [graph_of((3 * 10**30,)), graph_of((6 * 10**30,))])
    assert small is not None
    assert large is not None
    assert small.at({"batch_size": 9}) == graph_of((2,))
    assert small.at({"batch_size": 4}) is None
    assert large.at({"batch_size": 4}) == graph_of((4 * 10**30,))


@pytest.mark.parametrize(
    "other",
    [
        graph_of((4, 5), op="aten.z.default"),
        graph_of((4, 5), argument=0.25),
        graph_of((4, 5), argument="x"),
        graph_of((4, 5, 6)),
        replace(graph_of((4, 5)), model="Other"),
        replace(graph_of((4, 5)), gradients={"u": 1, "v": None}),
        replace(graph_of((4, 5)), gradients={"w": 1, "v": 1}),
        replace(graph_of((4, 5)), nodes=graph_of((4, 5)).nodes[:1]),
        replace(
            graph_of((4, 5)),
            nodes=(graph_of((4, 5)).nodes[0], replace(graph_of((4, 5)).nodes[1], phase=Phase.BACKWARD)),
        ),
        replace(graph_of((4, 5)), nodes=(graph_of((4, 5)).nodes[0], replace(graph_of((4, 5)).nodes[1], inputs=()))),
    ],
)
def test_graphs_of_another_structure_are_no_family(other: Graph) -> None:
    points = lattice(("batch_size",), {"batch_size": (2, 3)})
    assert Family.fit(("batch_size",), points, [graph_of((2, 3)), other]) is None
    assert Family.fit(("batch_size",), points, [graph_of((2, 3)), graph_of((4, 5))]) is not None


def test_equal_calls_of_a_fitted_graph_are_one_object() -> None:
    """As in a traced one: a price is computed once for each."""
    model = build("llama")
    profile = gtflops.profile(model, tokens(3, 17))
    profile.at(seq_len=20), profile.at(seq_len=40)
    calls = [node.call for node in profile.at(seq_len=30).graph.nodes]
    assert len({id(call) for call in calls}) == len(set(calls))
    assert np.sum([node.phase is Phase.BACKWARD for node in profile.graph.nodes]) > 100
