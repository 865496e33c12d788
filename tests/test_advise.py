"""Advice on a small model and small data: dead work counted by hand, each row held against select, what is left out."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gtflops
from gtflops.errors import InputError
from gtflops.recipes.advise import Advice, AdviceSettings, advise, dead_work
from gtflops.recipes.batches import EpochBatches
from gtflops.recipes.datasets import DataSet, load
from gtflops.recipes.models import Pretrained, load_pretrained
from gtflops.recipes.schemes import blocks_of
from small_tokenizer import save_llama

SEQ_LEN, BATCH = 16, 4
SETTINGS = AdviceSettings(
    total_flops=1e8, epochs=3, batch_size=BATCH, seq_len=SEQ_LEN, measure_on=2, learning_rate=1e-4
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return load_pretrained(str(save_llama(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """36 examples to train on: 3, 6 or 9 tokens of prompt, 3 of target and the end."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": "what it costs " * (1 + index % 3), "target": "a model learns"} for index in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return load("jsonl", path)


@pytest.fixture(scope="module")
def advice(pretrained: Pretrained, data: DataSet) -> Advice:
    return advise(pretrained, data, SETTINGS)


def test_dead_work_is_a_hand_count(pretrained: Pretrained, advice: Advice) -> None:
    # Of 0 to 39 without every tenth, 12 leave each rest by 3: 0, 10, 20 and 30 had the rests 0, 1, 2 and 0.
    number_by_length = {3 + 4: 14 - 2, 6 + 4: 13 - 1, 9 + 4: 13 - 1}
    tokens = sum(length * number for length, number in number_by_length.items())
    assert tokens == 12 * (7 + 10 + 13)
    dead = advice.dead
    assert advice.num_examples == sum(number_by_length.values()) == 36
    assert (dead.positions, dead.padding) == (36 * SEQ_LEN, 36 * SEQ_LEN - tokens)
    assert (dead.head_positions, dead.supervised) == (36 * SEQ_LEN, 36 * 4)

    def full(seq_len: int) -> int:
        ids = torch.ones(BATCH, seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        return gtflops.profile(pretrained.model, batch).full_flops

    assert advice.full_flops == full(SEQ_LEN)
    own = sum(number * full(length) for length, number in number_by_length.items())
    assert dead.padding_flops == pytest.approx(1 - own / (36 * full(SEQ_LEN)), rel=1e-12)
    # Three products of 32 by the vocabulary, 97, at each position: forward, and the gradients of input and weight.
    head = 3 * 2 * 32 * 97 * BATCH * SEQ_LEN / full(SEQ_LEN)
    assert dead.head_flops == pytest.approx(head * (SEQ_LEN - 4) / SEQ_LEN, rel=1e-12)
    real = tokens / 36
    assert dead.flops == pytest.approx(dead.padding_flops + head * (real - 4) / SEQ_LEN, rel=1e-12)


def test_dead_work_of_an_encoder_decoder() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    ids = torch.ones(2, 12, dtype=torch.int64)
    costs = gtflops.profile(model, {"input_ids": ids, "attention_mask": ids, "labels": ids[:, :6]})
    dead = dead_work(costs, [(12, 6), (5, 3)], seq_len=12, target_len=6, head="lm_head")
    assert (dead.positions, dead.padding) == (2 * 18, 7 + 3)
    assert (dead.head_positions, dead.supervised) == (12, 9)
    short = gtflops.profile(model, {"input_ids": ids[:, :5], "attention_mask": ids[:, :5], "labels": ids[:, :3]})
    assert dead.padding_flops == pytest.approx((1 - short.full_flops / costs.full_flops) / 2)
    assert dead.flops == dead.padding_flops, "each of the decoder's tokens has a label"
    without = dead_work(costs, [(12, 6)], seq_len=12, target_len=6, head=None)
    assert without.padding_flops == 0
    assert without.head_flops is without.flops is None


def test_each_choice_is_what_select_finds(pretrained: Pretrained, data: DataSet, advice: Advice) -> None:
    model = pretrained.model
    loader = EpochBatches(data.train, pretrained.tokenizer, batch_size=BATCH, seq_len=SEQ_LEN, seed=0)
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    profile = gtflops.profile(model, batches[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    importance = gtflops.measure_importance(model, batches, optimizer)
    positive = math.fsum(value for value in importance.values() if value > 0)
    everything = profile.step_flops([name for name, value in importance.items() if value > 0]).total
    full_steps = min(27, 1e8 / everything)
    assert advice.num_steps == 27 == 3 * 9
    by_name = {(choice.name, choice.reuse): choice for choice in advice.choices}
    assert len(by_name) == len(advice.choices)
    for budget in (0.4, 0.6, 0.9):
        chosen = gtflops.select(profile, importance, budget)
        choice = by_name[f"selection at {budget:g}", False]
        assert choice.share == chosen.flops / profile.full_flops
        assert choice.captured == pytest.approx(chosen.value / positive)
        assert choice.per_flop == pytest.approx(chosen.value / positive / (chosen.flops / everything))
        paid = min(27, 1e8 / chosen.flops)
        assert choice.steps == int(paid)
        assert choice.gain == pytest.approx(choice.captured * paid / full_steps)
    assert ("selection at 0.2", False) not in by_name, "below the forward pass"
    reused = gtflops.select(profile, importance, 0.3, reuse="prefix", epochs_left=3)
    choice = by_name["selection at 0.3", True]
    assert choice.captured == pytest.approx(reused.value / positive)
    assert choice.share == reused.flops / profile.full_flops <= 0.3
    step = profile.step_flops(reused.names, reuse="prefix")
    assert 27 * step.total + 9 * step.stored <= 1e8, "the total pays for all steps"
    assert choice.steps == 27

    top = [name for name, block in blocks_of(profile.names).items() if block == "model.layers.2"]
    two = [name for name, block in blocks_of(profile.names).items() if block in ("model.layers.1", "model.layers.2")]
    for number, names in ((1, top), (2, two)):
        choice = by_name[f"top {number} of 3 layers", False]
        assert choice.share == profile.step_flops(names).total / profile.full_flops
        assert choice.captured == pytest.approx(sum(importance[name] for name in names) / positive)
    lora = by_name["LoRA, rank 8 on queries and values", False]
    assert (lora.captured, lora.per_flop, lora.gain) == (None, None, None)
    assert lora.steps == min(27, int(1e8 / (lora.share * profile.full_flops)))
    first = advice.choices[0]
    assert (first.name, first.share, first.captured, first.gain) == ("everything, for fewer steps", 1, 1, 1)
    assert advice.point.reason == (gtflops.operating_point(profile, importance, total_flops=1e8, num_steps=27).reason)


def test_the_model_is_as_it_was(pretrained: Pretrained, data: DataSet) -> None:
    before = copy.deepcopy(pretrained.model.state_dict())
    modules = [name for name, _ in pretrained.model.named_modules()]
    advise(pretrained, data, SETTINGS)
    after = pretrained.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in pretrained.model.named_modules()] == modules
    assert all(tensor.requires_grad for tensor in pretrained.model.parameters())


def test_the_recommendation_says_what_it_rests_on(advice: Advice) -> None:
    first, *rest = advice.recommendation
    assert first[0].isupper()
    assert first.endswith(".")
    assert first[1:-1] == advice.best.reason[1:]
    assert rest[-1].startswith("Importance is a first-order estimate of the coming step, measured on 2 batches")
    data = json.loads(json.dumps(advice.to_json(), allow_nan=False))
    assert data["recommendation"] == list(advice.recommendation)
    assert data["choices"][0]["name"] == "everything, for fewer steps"
    assert data["dead_work"]["padding"] == advice.dead.padding


def test_what_is_left_out_is_said(pretrained: Pretrained, data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from gtflops.recipes import advise as module

    def refused(name: str) -> Any:
        raise InputError("lora is made by the package peft")

    monkeypatch.setattr(module, "scheme", refused)
    settings = AdviceSettings(epochs=1, batch_size=BATCH, seq_len=SEQ_LEN, measure_on=1)
    advice = advise(pretrained, data, settings)
    assert advice.point_with_reuse is None
    assert advice.best is advice.point
    assert not any(choice.reuse for choice in advice.choices)
    assert all(choice.steps is choice.gain is None for choice in advice.choices)
    assert advice.notes == (
        "reuse is left out: what is stored in an epoch is read in those after it, and there is one",
        "LoRA is left out: lora is made by the package peft",
    )
    assert "measured on 1 batch before" in advice.recommendation[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a positive number"),
        ({"measure_on": 0}, "measure_on is 0, expected a positive number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive number"),
        ({"total_flops": 0.5}, "total_flops is 0.5, expected a positive number of FLOPs"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdviceSettings(**changes)


def test_too_few_examples(pretrained: Pretrained, data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="36 examples do not fill a batch of 40"):
        advise(pretrained, data, AdviceSettings(batch_size=40, seq_len=SEQ_LEN))
