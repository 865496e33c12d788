"""Shared tensors, use by use: costs are exact, gradients are those of the chosen uses, and the model is left tied."""

import copy
import itertools
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import gtflops
from gtflops import InputError, Profile
from gtflops.capture.uses import train_uses
from gtflops.cli import main
from gtflops.forms import Sum
from gtflops.integrations.transformers import GreenTrainerCallback
from gtflops.problem import Problem
from gtflops.report.log import training_log
from gtflops.training import JsonLines
from real_steps import counted_by_pytorch
from small_models import VOCABULARY, build, padded_batch
from small_tokenizer import word_tokenizer
from test_trainer_callback import trainer_of

Batch = Any
SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}


class Toy(torch.nn.Module):
    """One weight at three places, and one at two; a module that holds none of its own beside."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 6)
        self.middle = torch.nn.Linear(6, 6)
        self.cells = torch.nn.ModuleList(torch.nn.LSTM(6, 6, batch_first=True) for _ in range(2))
        self.head = torch.nn.Linear(6, 6)
        self.middle.weight = self.head.weight = self.embed.weight
        self.cells[1].weight_hh_l0 = self.cells[0].weight_hh_l0
        self.checkpointed = checkpointed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for cell in self.cells:
            hidden = hidden + cell(hidden)[0]
        hidden = checkpoint(self._middle, hidden, use_reentrant=False) if self.checkpointed else self._middle(hidden)
        return self.head(hidden).square().sum()

    def _middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.middle(hidden).tanh()


def loss(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return outputs


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, attn_implementation="eager"
    )
    return transformers.T5ForConditionalGeneration(config), padded_batch()


def bert() -> Any:
    config = transformers.BertConfig(
        **SMALL, hidden_size=16, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config._attn_implementation = "eager"
    return transformers.BertForMaskedLM(config), padded_batch()


def decoder(family: str) -> Any:
    model = build(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, padded_batch()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: decoder("llama-tied"),
    "gpt2": lambda: decoder("gpt2"),
    "t5": t5,
    "bert": bert,
    "toy": lambda: (Toy(), torch.arange(6).view(2, 3)),
    "checkpointed": lambda: (Toy(checkpointed=True), torch.arange(6).view(2, 3)),
}
#: Every use that the loss depends on.
USES = {
    "llama": [("lm_head.weight", "model.embed_tokens.weight")],
    "gpt2": [("lm_head.weight", "transformer.wte.weight")],
    "t5": [("lm_head.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")],
    "bert": [
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias",),
    ],
    "toy": [
        ("head.weight", "middle.weight", "embed.weight"),
        ("cells.1.weight_hh_l0", "cells.0.weight_hh_l0"),
    ],
}
USES["checkpointed"] = USES["toy"]


def loss_for(name: str) -> Any:
    return loss if isinstance(MODELS[name]()[0], Toy) else None


def profile_of(name: str) -> tuple[Any, Batch, Profile]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    return model, batch, gtflops.profile(model, batch, loss_for(name), uses="separate")


def value_of(model: Any, batch: Batch) -> torch.Tensor:
    result: torch.Tensor = model(**batch).loss if isinstance(batch, dict) else model(batch)
    return result


def subsets(names: Any) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def untied(model: Any) -> Any:
    """A copy in which every place has a tensor of its own, made without gtflops."""
    copied = copy.deepcopy(model)
    for name, tensor in list(copied.named_parameters(remove_duplicate=False)):
        path, _, attribute = name.rpartition(".")
        setattr(copied.get_submodule(path), attribute, torch.nn.Parameter(tensor.detach().clone()))
    return copied


def places(model: Any) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}


# --- costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_every_subset_of_uses_executes_what_is_planned(name: str) -> None:
    model, batch, profile = profile_of(name)
    shared = [use for uses in USES[name] for use in uses]
    others = [tensor.name for tensor in profile.tensors if tensor.has_gradient and tensor.name not in shared]
    assert {use for names, _ in profile.graph.uses for use in names} >= {use for use in shared if "bias" not in use}
    held = places(model)
    for chosen in subsets(shared):
        for beside in ((), others[:2], others[-1:]):
            if not chosen and not beside:
                continue
            names = {*chosen, *beside}
            train_uses(model, names)
            model.zero_grad()
            with gtflops.ExecutedFlops() as executed:
                value_of(model, batch).backward()
            assert executed.total == profile.step_flops(names).total, names
            assert sum(step.total for step in profile.by_operator(names).values()) == executed.total
            assert profile.by_module(names)[""].total == executed.total
            if name not in ("toy", "checkpointed") and not beside:  # PyTorch's counter has no LSTM
                matmul = profile.step_flops(names, ops="matmul")
                assert counted_by_pytorch(model, batch) == (matmul.forward, matmul.backward), names
    gtflops.tie(model)
    assert places(model) == held
    tied = gtflops.profile(model, batch, loss_for(name))
    assert profile.full_flops == tied.full_flops
    assert profile.activation_bytes("all") == tied.activation_bytes("all")
    assert profile.forward_flops + profile.t_dw.sum() + profile.t_dy.sum() == profile.full_flops
    assert profile.verify(model, batch, loss_for(name), selections=1).exact


def test_many_selections_at_once_cost_what_each_does() -> None:
    _, _, profile = profile_of("t5")
    masks = np.random.default_rng(0).random((50, len(profile.names))) < 0.3
    for ops in ("all", "matmul"):
        totals = profile.step_flops_of_many(masks, ops=ops).sum(axis=1)  # type: ignore[arg-type]
        assert totals.tolist() == [profile.step_flops(mask, ops=ops).total for mask in masks]  # type: ignore[arg-type]
    assert profile.form("flops").totals(masks).tolist() == [profile.step_flops(mask).total for mask in masks]


def test_additions_take_their_time() -> None:
    _, _, profile = profile_of("llama")
    (names, (addition,)) = profile.graph.uses[0]
    nanoseconds = np.zeros(len(profile.graph.nodes), dtype=np.int64)
    nanoseconds[addition] = 5
    timed = replace(profile, nanoseconds=nanoseconds)
    assert timed.step_seconds(names) == timed.step_seconds("all") == 5e-9
    assert timed.step_seconds(names[:1]) == timed.step_seconds(names[1:]) == 0


def test_other_shapes_and_files_have_the_uses(tmp_path: Path) -> None:
    choice = ["lm_head.weight", "model.embed_tokens.weight"]
    model, _, profile = profile_of("llama")
    for seq_len in (8, 24, 20):  # the last one is interpolated
        other, fresh = profile.at(seq_len=seq_len), gtflops.profile(model, padded_batch(3, seq_len), uses="separate")
        for names in (choice, choice[:1], choice[1:], "all"):
            assert other.step_flops(names) == fresh.step_flops(names)
        assert other.form("flops").total(other.mask(choice)) == fresh.step_flops(choice).total
        assert other.partial(choice[:1]) == ("lm_head.weight",)
    assert "interpolated" in other.notes[0]
    named = gtflops.profile("facebook/opt-125m", batch_size=1, seq_len=8, uses="separate")
    named.save(tmp_path / "profile.json")
    read = Profile.load(tmp_path / "profile.json")
    assert read.graph == named.graph
    assert read.at(seq_len=4).graph.uses == named.graph.uses != ()  # traced again by its name


def test_graphs_that_do_not_add_up_are_refused() -> None:
    _, _, profile = profile_of("llama")
    data = profile.graph.to_json()
    names, sums = data["uses"][0]
    for broken in ([names, []], [names, [*sums, *sums]], [names, [len(data["nodes"])]]):
        with pytest.raises(ValueError, match="are added up by"):
            type(profile.graph).from_json({**data, "uses": [broken]})
    old = {key: value for key, value in data.items() if key != "uses"}
    assert type(profile.graph).from_json(old).uses == ()


def test_models_without_shared_tensors_are_as_ever() -> None:
    model, batch = decoder("llama")
    plain, separate = gtflops.profile(model, batch), gtflops.profile(model, batch, uses="separate")
    assert separate.graph == plain.graph
    trainer = gtflops.GreenTrainer(
        model, torch.optim.AdamW(model.parameters()), plain, 0.6, uses="separate", count_executed=True
    )
    log = trainer.fit([batch])
    assert log.executed_flops == log.planned_flops
    assert log.selections[0].partial == ()


def test_a_module_that_runs_twice_is_one_use() -> None:
    layer = torch.nn.Linear(4, 4)
    model, x = torch.nn.Sequential(layer, torch.nn.Tanh(), layer), torch.ones(2, 4)
    profile = gtflops.profile(model, x, loss=lambda y, _: y.sum(), uses="separate")
    assert set(profile.names) == {"0.bias", "0.weight"}
    assert profile.graph.uses == ()
    assert profile.verify(model, x, loss=lambda y, _: y.sum()).exact


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_those_of_the_chosen_uses_alone(name: str) -> None:
    model, batch, profile = profile_of(name)
    reference = untied(model)
    value_of(reference, batch).backward()
    parts = dict(reference.named_parameters())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for uses in USES[name]:
        owner = model.get_parameter(uses[0])
        for chosen in subsets(uses):
            if not chosen:
                continue
            train_uses(model, set(chosen))
            model.zero_grad()
            value_of(model, batch).backward()
            wanted = sum(parts[use].grad for use in chosen)
            if len(chosen) < 3:
                assert torch.equal(owner.grad, wanted), chosen
            else:  # which two of three are added first is autograd's to choose
                torch.testing.assert_close(owner.grad, wanted)
            with_gradient = [key for key, tensor in model.named_parameters() if tensor.grad is not None]
            assert len(with_gradient) == 1
            gtflops.tie(model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert profile.partial([USES[name][0][0]]) == (USES[name][0][0],)
    assert profile.partial(USES[name][0]) == ()


def test_a_frozen_use_sees_what_the_others_learn() -> None:
    model, batch, _ = profile_of("llama")
    train_uses(model, {"lm_head.weight"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    value_of(model, batch).backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.lm_head.weight.data_ptr() == copied.model.embed_tokens.weight.data_ptr()
        assert copied.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
        assert value_of(gtflops.tie(copied), batch) == value_of(model, batch)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight


# --- selection --------------------------------------------------------------------------------------------------


def best_by_hand(profile: Profile, values: Mapping[str, float], limit: int) -> float:
    names = [name for name in profile.names if values[name] > 0]
    masks = np.array([profile.mask(chosen) for chosen in subsets(names)])
    fits = profile.step_flops_of_many(masks).sum(axis=1) <= limit
    worth = masks @ np.array([values[name] for name in profile.names])
    return float(worth[fits].max())


@pytest.mark.parametrize("seed", range(6))
def test_selections_are_the_best_there_are(seed: int) -> None:
    """Also at limits that one addition of gradients more would exceed."""
    _, _, profile = profile_of("toy")
    generator = np.random.default_rng(seed)
    some = generator.choice(len(profile.names), 7, replace=False)
    shared = {use for uses in USES["toy"] for use in uses}
    values = {
        name: float(generator.uniform(0.1, 2)) if position in some or name in shared else 0.0
        for position, name in enumerate(profile.names)
    }
    limits = {profile.step_flops(chosen).total for chosen in subsets(sorted(shared)) if chosen}
    problem = Problem.of(profile, values)
    for limit in sorted(limits | {limit - 1 for limit in limits} | {profile.full_flops})[:: 3 if seed else 1]:
        if limit < problem.smallest:
            continue
        found = problem.solve(limit)
        assert found.optimal
        assert found.value == pytest.approx(best_by_hand(profile, values, limit))
        assert found.upper_bound == found.value
        chain = Problem.of(profile, values, form="chain")
        if limit >= chain.smallest:
            assert chain.solve(limit).value <= found.value + 1e-9


def test_of_very_many_uses_selections_fit_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, profile = profile_of("toy")
    values = {name: float(worth) for name, worth in zip(profile.names, itertools.cycle((1, 3, 2)), strict=False)}
    problem = Problem.of(profile, values)
    limits = np.linspace(problem.smallest, profile.full_flops, 12).astype(int).tolist()
    best = [problem.solve(limit).value for limit in limits]
    monkeypatch.setattr("gtflops.forms.MOST_PROBLEMS", 5)
    for limit, value in zip(limits, best, strict=True):
        found = problem.solve(limit)
        assert profile.step_flops(found.mask).total <= limit
        assert found.value <= value <= found.upper_bound
        assert not found.optimal or found.value == value
    assert problem.solve(profile.full_flops).value > 0.9 * best[-1]


def test_a_model_with_frozen_uses_is_not_taken_for_an_untied_one() -> None:
    model, batch, _ = profile_of("llama")
    model = copy.deepcopy(model)
    train_uses(model, {"lm_head.weight"})
    optimizer = torch.optim.AdamW(model.parameters())
    for wrong in (
        lambda: gtflops.profile(model, batch),
        lambda: gtflops.measure_importance(model, [batch], optimizer),
        lambda: gtflops.GreenTrainer(model, optimizer, batch),
    ):
        with pytest.raises(gtflops.InputError, match=r"stands for a shared tensor.*gtflops\.tie"):
            wrong()
    gtflops.profile(gtflops.tie(model), batch)


@pytest.mark.parametrize(
    "conditions",
    [
        {"must_train": "middle.weight"},
        {"must_freeze": "head.weight"},
        {"granularity": "layer"},
        {"granularity": "layer", "must_train": "cells.1.weight_hh_l0"},
        {"max_elements": 450},
        {"max_elements": 450, "must_train": "embed.weight"},
        {"form": "chain"},
    ],
    ids=lambda conditions: " ".join(map(str, conditions.values())),
)
def test_conditions_hold_with_sums(conditions: dict[str, Any]) -> None:
    """Against every choice of items, at limits between the smallest step and the full one."""
    _, _, profile = profile_of("toy")
    problem = Problem.of(
        profile, {name: 1.0 + position / 7 for position, name in enumerate(profile.names)}, **conditions
    )
    items = np.array(list(itertools.product([False, True], repeat=len(problem.worth))))
    masks = problem.forced | (items & (problem.worth > 0))[:, problem.item_of]
    costs = profile.step_flops_of_many(masks).sum(axis=1)
    values = masks @ problem.values
    allowed = np.array([problem.fits(mask) and mask.any() for mask in masks])
    for limit in np.linspace(problem.smallest, profile.full_flops, 12).astype(int).tolist():
        found = problem.solve(limit)
        assert problem.exact.total(found.mask) == profile.step_flops(found.mask).total <= limit
        assert problem.fits(found.mask)
        best = values[allowed & (costs <= limit)].max()
        assert found.value <= best + 1e-9
        if problem.form_name == "graph":
            assert found.upper_bound >= best - 1e-9
            assert found.value == pytest.approx(best) or not found.optimal


def test_sums_count_parts() -> None:
    one = Sum(np.array([1, 0, 2, 1]), 10)
    every = [np.array(items) for items in itertools.product([False, True], repeat=4)]
    for items in every:
        assert one.of(items) == 10 * max(0, int(one.parts[items].sum()) - 1)
    assert one.of_many(np.array(every)).tolist() == [one.of(items) for items in every]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_by_use_is_never_worse(name: str) -> None:
    model, batch, profile = profile_of(name)
    tied = gtflops.profile(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    by_use = gtflops.measure_importance(model, [batch], optimizer, uses="separate")
    as_one = gtflops.measure_importance(model, [batch], optimizer)
    better = 0
    for budget in (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        whole = gtflops.select(tied, as_one, budget)
        parts = gtflops.select(profile, by_use, budget)
        assert parts.value >= whole.value - 1e-6 * abs(whole.value)
        better += parts.value > 1.01 * whole.value
    assert better or name == "t5", "the head alone was never worth it"


# --- importance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["one-pass", "two-pass"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor])
def test_importances_of_uses_add_up_to_that_of_the_tensor(kind: Any, method: Any) -> None:
    torch.manual_seed(0)
    model, batch = Toy().double(), torch.arange(6).view(2, 3)
    optimizer = kind(model.parameters(), lr=1e-2)
    given: Any = {"loss": loss, "method": method, "update": "first"}
    held, values = places(model), copy.deepcopy(model.state_dict())
    by_use = gtflops.measure_importance(model, [batch, batch.flip(0)], optimizer, **given, uses="separate")
    as_one = gtflops.measure_importance(model, [batch, batch.flip(0)], optimizer, **given)
    assert sum(by_use[use] for use in USES["toy"][0]) == pytest.approx(as_one["embed.weight"])
    assert sum(by_use[use] for use in USES["toy"][1]) == pytest.approx(as_one["cells.0.weight_hh_l0"])
    assert by_use["head.bias"] == pytest.approx(as_one["head.bias"])
    assert places(model) == held
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(tensor.requires_grad and tensor.grad is None for tensor in model.parameters())


def test_importance_of_a_use_is_what_training_it_brings() -> None:
    """To first order, and by an optimizer whose update is linear in the gradient, of any uses together."""
    torch.manual_seed(0)
    model, batch = Toy().double(), torch.arange(6).view(2, 3)
    rate = 1e-7
    importance = gtflops.measure_importance(
        model, [batch], torch.optim.SGD(model.parameters(), lr=rate), loss, uses="separate"
    )
    for chosen in subsets(USES["toy"][0]):
        if not chosen:
            continue
        trained = copy.deepcopy(model)
        train_uses(trained, set(chosen))
        before = value_of(trained, batch)
        before.backward()
        torch.optim.SGD(trained.parameters(), lr=rate).step()
        real = before.item() - value_of(trained, batch).item()
        assert real == pytest.approx(sum(importance[use] for use in chosen), rel=1e-3), chosen


# --- training ---------------------------------------------------------------------------------------------------


def batches_of(number: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (number, 2, 8), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


def trainer_for(model: Any, **options: Any) -> gtflops.GreenTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"budget": 0.5, "every": 2, "uses": "separate", "count_executed": True, **options}
    return gtflops.GreenTrainer(model, optimizer, batches_of()[0], **settings)


HEAD = ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_runs_execute_what_they_plan(name: str, accumulate: int) -> None:
    model, _ = MODELS[name]()
    held = places(model)
    partial = set()
    for budget in (0.45, 0.8):
        model.requires_grad_(True)
        log = trainer_for(model, budget=budget).fit(batches_of(), accumulate=accumulate)
        assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
        assert log.planned_flops <= budget * log.full_flops
        assert places(model) == held
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        partial.update(name for record in log.selections for name in record.partial)
    assert partial == {"lm_head.weight"}


def test_weights_are_those_of_a_head_that_alone_gets_gradients() -> None:
    """Against a loop without gtflops, in which the input is embedded by a detached weight."""
    model, _ = decoder("llama-tied")
    reference = copy.deepcopy(model)
    trainer_for(model, choose=lambda profile, step: HEAD).fit(batches_of())
    weight = reference.lm_head.weight
    reference.requires_grad_(False)
    reference.model.embed_tokens.forward = lambda ids: torch.nn.functional.embedding(ids, weight.detach())
    weight.requires_grad_(True)
    reference.model.norm.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    for batch in batches_of():
        value_of(reference, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True)
    )


def test_a_run_that_fails_leaves_the_model_tied() -> None:
    model, _ = decoder("llama-tied")
    held = places(model)
    trainer = trainer_for(model, choose=lambda profile, step: HEAD)
    broken = {**batches_of()[0], "labels": torch.full((2, 8), VOCABULARY + 5)}
    with pytest.raises(gtflops.GtflopsError):
        trainer.fit([batches_of()[0], broken])
    assert places(model) == held
    assert model.lm_head.weight.requires_grad
    log = trainer.fit(batches_of())  # and goes on
    assert log.executed_flops == log.planned_flops
    assert places(model) == held


def test_a_loop_of_ones_own_ties_at_its_end() -> None:
    model, _ = decoder("llama-tied")
    trainer = trainer_for(model, choose=lambda profile, step: HEAD)
    for batch in batches_of(2):
        record = trainer.step_boundary(batch)
        assert model.model.embed_tokens.weight is not model.lm_head.weight
        assert not model.model.embed_tokens.weight.requires_grad
        with gtflops.ExecutedFlops() as executed:
            value_of(model, batch).backward()
        assert executed.total == record.planned_flops
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    trainer.tie()
    assert model.model.embed_tokens.weight is model.lm_head.weight
    trainer.step_boundary(batches_of()[0])
    assert model.model.embed_tokens.weight is not model.lm_head.weight
    model.tie_weights()
    trainer.optimizer.step()
    with pytest.raises(InputError, match="by something else since the last step"):
        trainer.step_boundary(batches_of()[0])


def test_a_model_that_was_moved_and_back_is_still_one() -> None:
    model, _ = decoder("llama-tied")
    trainer = trainer_for(model, choose=lambda profile, step: HEAD)
    trainer.step_boundary(batches_of()[0])
    model.double().float()  # each tensor by itself
    value_of(model, batches_of()[0]).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.step_boundary(batches_of()[1])
    assert model.model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    whole, _ = decoder("llama-tied")
    stopped = copy.deepcopy(whole)
    straight = trainer_for(whole).fit(batches_of(6))
    trainer_for(stopped).fit(batches_of(6), num_steps=3, checkpoints=tmp_path)
    resumed, _ = decoder("llama-tied")
    log = trainer_for(resumed).fit(batches_of(6), checkpoints=tmp_path, resume=True)
    assert [step.loss for step in log.steps] == [step.loss for step in straight.steps]
    assert [record.partial for record in log.selections] == [record.partial for record in straight.selections]
    assert any(record.partial for record in log.selections)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert places(resumed).keys() == places(whole).keys()
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    with pytest.raises(InputError, match="had uses='separate', expected the same, not None"):
        trainer_for(resumed, uses=None).fit(batches_of(6), checkpoints=tmp_path, resume=True)


def test_what_reads_a_weight_that_moves_is_not_reused(tmp_path: Path) -> None:
    """Frozen at the input or not: what the head learns moves the input's weight, and all blocks above it."""
    model, _ = decoder("llama-tied")
    profile = gtflops.profile(model, batches_of()[0], uses="separate")
    top = [name for name in profile.names if ".layers.2." in name]
    assert len(profile.step_flops(top, reuse="prefix").blocks) == 2
    assert profile.step_flops([*top, "lm_head.weight"], reuse="prefix").blocks == ()
    weights = []
    for number, choice in enumerate(([*top], [*top, "lm_head.weight"])):
        for reuse in ({}, {"reuse": "prefix", "store": tmp_path / str(number)}):
            trained = copy.deepcopy(model)
            trainer = trainer_for(trained, every="epoch", choose=lambda profile, step: choice, **reuse)  # noqa: B023
            log = trainer.fit(batches_of(2), epochs=2)
            assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
            assert any(step.reused for step in log.steps) == (bool(reuse) and number == 0)
            weights.append(list(trained.parameters()))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights[-2:], strict=True))


def test_selections_with_reuse_keep_within_the_budget(tmp_path: Path) -> None:
    model, _ = decoder("llama-tied")
    log = trainer_for(model, budget=0.4, every="epoch", reuse="prefix", store=tmp_path).fit(batches_of(), epochs=4)
    assert log.executed_flops == log.planned_flops <= 0.4 * log.full_flops


def test_the_log_says_what_is_partial(tmp_path: Path) -> None:
    model, _ = decoder("llama-tied")
    path = tmp_path / "run.jsonl"
    trainer = trainer_for(model)
    log = trainer.fit(batches_of(), watchers=[JsonLines(path)])
    assert log.selections[0].partial == ("lm_head.weight",)
    assert log.to_json()["selections"][0]["partial"] == ["lm_head.weight"]
    assert type(log).from_json(log.to_json(), trainer.profile).selections[0].partial == ("lm_head.weight",)
    read = training_log(path, trainer.profile)
    assert read.selections[0].partial == ("lm_head.weight",)
    for suffix in (".md", ".html"):
        trainer.profile.report(tmp_path / f"run{suffix}", selection=trainer.selection, log=read)
        text = (tmp_path / f"run{suffix}").read_text(encoding="utf-8")
        assert "By a partial gradient" in text
        assert "partial gradient, not through all uses of the tensor" in text
    trainer.profile.report(tmp_path / "run.json", selection=trainer.selection, log=read)
    data = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert data["selection"]["partial"] == data["training"]["selections"][0]["partial"] == ["lm_head.weight"]


def test_in_the_trainer(tmp_path: Path) -> None:
    model = build("llama-tied")
    held = places(model)
    callback = GreenTrainerCallback(0.5, every=2, uses="separate")
    trainer = trainer_of(model, tmp_path, callback, save_strategy="steps", save_steps=3, num_train_epochs=1)
    trainer.train()
    assert trainer.executed == [step.planned_flops for step in callback.log.steps]
    assert any(record.partial for record in callback.log.selections)
    assert places(model) == held
    assert all(tensor.requires_grad for tensor in model.parameters())
    again, callback = build("llama-tied"), GreenTrainerCallback(0.5, every=2, uses="separate")
    resumed = trainer_of(again, tmp_path, callback, save_strategy="no", num_train_epochs=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.losses == trainer.losses[3:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), model.parameters(), strict=True))


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str | Path, expect: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["gtflops", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capfd.readouterr()
        assert left.value.code == expect, printed.err
        return printed.out, printed.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama-tied").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_profile_and_select_by_command(command: Callable[..., tuple[str, str]], folder: Path, tmp_path: Path) -> None:
    sizes = ("--batch-size", "2", "--seq-len", "8")
    table, _ = command("profile", folder, *sizes, "--uses", "separate", "--save", tmp_path / "uses.json")
    assert "lm_head.weight" in table
    costs = Profile.load(tmp_path / "uses.json")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(costs.names)
    values = {name: float(name == "lm_head.weight") + 1e-6 for name in costs.names}
    (tmp_path / "importance.json").write_text(json.dumps(values), encoding="utf-8")
    choose = ("--importance", tmp_path / "importance.json", "--budget", "0.5")
    facts, _ = command("select", tmp_path / "uses.json", *choose, "--uses", "separate")
    assert "By a partial gradient" in facts
    data, _ = command("select", folder, *sizes, *choose, "--uses", "separate", "--json")
    assert json.loads(data)["partial"] == ["lm_head.weight"]
    command("profile", folder, *sizes, "--save", tmp_path / "plain.json")
    _, refused = command("select", tmp_path / "plain.json", *choose, "--uses", "separate", expect=2)
    assert "saved with --uses separate" in refused


def test_train_by_command(command: Callable[..., tuple[str, str]], folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "what it costs " * (1 + index % 3), "target": "a model learns"} for index in range(20)]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ("--data", pairs, "--seq-len", "16", "--steps", "2", "--quality-examples", "0", "--loss-examples", "2")
    run, said = command("train", folder, *options, "--budget", "0.5", "--uses", "separate", "--json")
    data = json.loads(run)
    assert data["selections"][0]["partial"] == ["lm_head.weight"]
    assert data["counted_step"]["planned"] == data["counted_step"]["executed"]
    assert "step 0: partial gradient, not through all uses of the tensor: lm_head.weight" in said
    _, refused = command("train", folder, *options, "--scheme", "full", "--uses", "separate", expect=2)
    assert "--uses is for the scheme greentrainer" in refused


# --- what is refused --------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    model, batch, separate = profile_of("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    calls: list[Callable[..., Any]] = [
        lambda uses: gtflops.profile(model, batch, uses=uses),
        lambda uses: gtflops.measure_importance(model, [batch], optimizer, uses=uses),
        lambda uses: gtflops.GreenTrainer(model, optimizer, batch, uses=uses),
        lambda uses: GreenTrainerCallback(uses=uses),
    ]
    for call in calls:
        with pytest.raises(InputError, match="uses is 'apart', expected 'separate'"):
            call("apart")
    with pytest.raises(InputError, match="graph='compiled'"):
        gtflops.profile(model, batch, graph="compiled", uses="separate")
    with pytest.raises(InputError, match="expected the same in both"):
        gtflops.GreenTrainer(model, optimizer, separate)
    with pytest.raises(InputError, match="a shared tensor as a whole and uses is 'separate'"):
        gtflops.GreenTrainer(model, optimizer, gtflops.profile(model, batch), uses="separate")
    other = build("llama")
    with pytest.raises(InputError, match="expected the model that was profiled"):
        separate.require_fit(build("gpt2"))
    assert separate.mask(other).sum() == len(separate.names)  # of an untied model, the same names
