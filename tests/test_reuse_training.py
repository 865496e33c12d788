"""Training from stored activations: planned is executed, budgets hold over a run, and the weights are the same."""

import copy
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import gtflops
import small_models
from gtflops import InputError
from gtflops.errors import InfeasibleBudgetError, UnsupportedModelError
from gtflops.integrations.transformers import GreenTrainerCallback
from gtflops.reuse import ActivationStore
from gtflops.training import Auto, Total
from test_checkpoints import last_line, start
from test_reuse_prefix import FAMILIES, Batch, without_dropout
from test_trainer_callback import Counting, padded, rows, trainer_of


def other_examples(batch: Batch, seed: int) -> Batch:
    """A batch of the same shapes and padding."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(batch)
    if "pixel_values" in batch:
        made["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=generator)
        return made
    ids, mask = batch["input_ids"], batch["attention_mask"]
    made["input_ids"] = torch.randint(3, small_models.VOCABULARY, ids.shape, generator=generator) * mask
    if batch["labels"].shape == ids.shape:
        made["labels"] = made["input_ids"].masked_fill(mask == 0, -100)
    return made


def family_of(name: str) -> tuple[Any, list[Batch]]:
    torch.manual_seed(0)
    model, _, batch = FAMILIES[name]()
    return model.requires_grad_(True), [other_examples(batch, seed) for seed in range(3)]


def trainer_for(model: Any, batches: Any, store: Any, **options: Any) -> gtflops.GreenTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reuse = {} if store is None else {"reuse": "prefix", "store": store}
    settings = {"budget": 0.4, "every": "epoch", "count_executed": True, **reuse, **options}
    return gtflops.GreenTrainer(model, optimizer, next(iter(batches)), **settings)


def top(profile: gtflops.Profile, step: int) -> list[str]:
    """A choice of the last block and the head: always the same."""
    return [name for name in profile.names if name.startswith((f"{profile.blocks[-1].name}.", "lm_head", "classifier"))]


def top_of(family: str) -> Callable[[gtflops.Profile, int], list[str]]:
    """What is trained above the blocks of ``FAMILIES``."""
    if family != "t5-half-encoder":
        return top
    return lambda profile, step: [name for name in profile.names if re.match(r"encoder\.block\.[23]\.", name)]


WHOLE = [name for name in FAMILIES if name != "t5-half-encoder"]


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
@pytest.mark.parametrize(
    ("family", "budget"),
    [*((name, budget) for name in WHOLE for budget in (0.2, 0.3, 0.6)), ("t5-half-encoder", 0.5)],
)
def test_planned_is_executed_and_the_budget_holds_over_the_run(family: str, budget: float, tmp_path: Path) -> None:
    model, batches = family_of(family)
    # What is in the middle of an encoder is not trained for so little by choice.
    must_train = ["encoder.block.2.*.SelfAttention.q.weight"] if family == "t5-half-encoder" else ()
    trainer = trainer_for(model, batches, tmp_path, budget=budget, must_train=must_train)
    log = trainer.fit(batches, epochs=5)
    if must_train:
        assert log.selections[0].held == tuple(FAMILIES[family]()[1])
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert log.planned_flops <= budget * log.full_flops
    assert [step.reused for step in log.steps] == [False] * 3 + [True] * 12
    assert all(module.training for module in model.modules())
    assert log.selections[0].held
    assert "without dropout" in str(log.selections[0].reason)
    assert log.selections[0].held == log.selections[-1].held
    read = type(log).from_json(log.to_json(), trainer.profile)
    assert [record.held for record in read.selections] == [record.held for record in log.selections]
    assert [step.reused for step in read.steps] == [step.reused for step in log.steps]


def test_a_budget_below_the_forward_pass_learns(tmp_path: Path) -> None:
    """0.25 of a full step; without reuse it names both floors."""
    torch.manual_seed(0)
    model = small_models.build("llama")
    batches = [small_models.padded_batch() for _ in range(3)]
    with pytest.raises(InfeasibleBudgetError, match="reuse='prefix' makes 0"):
        trainer_for(copy.deepcopy(model), batches, None, budget=0.25).fit(batches, epochs=8)
    log = trainer_for(model, batches, tmp_path, budget=0.25, measure=gtflops.measure_importance).fit(batches, epochs=8)
    losses = [step.loss for step in log.steps if step.loss is not None]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.2
    assert log.planned_flops <= 0.25 * log.full_flops


@pytest.mark.parametrize("family", list(FAMILIES))
def test_weights_are_those_without_reuse_to_the_bit(family: str, tmp_path: Path) -> None:
    model, batches = family_of(family)
    without_dropout(model)
    found = []
    for store in (None, tmp_path):
        trained = copy.deepcopy(model)
        trainer = trainer_for(trained, batches, store, choose=top_of(family))
        log = trainer.fit(batches, epochs=3)
        assert [step.reused for step in log.steps] == [False] * 3 + [store is not None] * 6
        assert log.selections[0].held == (() if store is None else tuple(FAMILIES[family]()[1]))
        found.append(trained.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def loader(family: str, batch_size: int = 2, **options: Any) -> tuple[Any, Any]:
    """Examples of several lengths, shuffled, in batches padded to their longest."""
    model, _ = family_of(family)
    generator = torch.Generator().manual_seed(4)
    data = rows((6, 11, 9), kind="bert" if family == "bert" else "llama")
    collate: Any = padded
    for number, row in enumerate(data):
        if family == "bert":
            row["labels"] = number % 2
        elif family.startswith("t5"):
            row["labels"] = row["input_ids"][:5].flip(0)
        elif family == "vit":
            data[number] = {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": number % 2}
            collate = None
    options = {"shuffle": True, "generator": generator, "collate_fn": collate, **options}
    return model, DataLoader(data, batch_size, **options)  # type: ignore[arg-type]


#: Moves all scores of a row alike, which a softmax takes away: its gradient is rounding, and AdamW makes steps of it.
KEY_BIAS = re.compile(r"\.k_proj\.bias$")


@pytest.mark.parametrize(
    "family", [name if name == "opt" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_weights_are_those_without_reuse_when_shuffled(family: str, tmp_path: Path) -> None:
    """In single precision, by the norm of each tensor."""
    found = []
    for store in (None, tmp_path):
        model, batches = loader(family)
        without_dropout(model)
        log = trainer_for(model, batches, store, choose=top_of(family)).fit(batches, epochs=3)
        assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
        assert all(step.reused for step in log.steps[6:]) == (store is not None)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        if not KEY_BIAS.search(name):
            assert (found[1][name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.slow
def test_several_workers_of_a_loader(tmp_path: Path) -> None:
    model, batches = loader("llama", num_workers=2)
    log = trainer_for(model, batches, tmp_path, choose=top).fit(batches, epochs=3)
    assert [step.reused for step in log.steps] == [False] * 6 + [True] * 12
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
@pytest.mark.parametrize("budget", [0.3, pytest.param(0.5, marks=pytest.mark.slow)])
def test_several_shapes_at_once(budget: float, tmp_path: Path) -> None:
    """Batches of several lengths, accumulated, with dropout above the boundary and selections inside of epochs."""
    model, batches = loader("opt")
    trainer = trainer_for(model, batches, tmp_path, budget=budget, every=2, must_freeze=["*embed*"])
    log = trainer.fit(batches, epochs=4, accumulate=2)
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert log.planned_flops <= budget * log.full_flops
    assert sum(step.reused for step in log.steps) >= 9
    assert trainer.log.planned_flops > 0.8 * budget * log.full_flops, "and the budget is used"


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
def test_a_total_of_flops_is_never_exceeded(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    full = gtflops.profile(model, batches[0]).full_flops
    total = int(0.4 * full * 15 + 6 * full)  # and five measurements
    trainer = trainer_for(model, batches, tmp_path, budget=Total(flops=total))
    log = trainer.fit(batches, epochs=5)
    assert 0.9 * total < log.planned_flops + log.measuring_flops <= total
    assert len(log.steps) == 15


# --- the boundary -------------------------------------------------------------------------------------------------


def measuring(by_epoch: list[Callable[[str], float]], steps: int = 3) -> Callable[..., dict[str, float]]:
    """In the place of measuring: importances by name, others in each epoch."""
    calls: Iterator[Callable[[str], float]] = iter(by_epoch)

    def measure(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        worth = next(calls)
        return {name: worth(name) for name, _ in model.named_parameters()}

    return measure


def only(layer: int) -> Callable[[str], float]:
    """Importance in this layer, and next to none in the head."""
    return lambda name: 1.0 if f"layers.{layer}." in name else 1e-9 if "lm_head" in name else 0.0


def test_of_an_encoder_decoder_a_step_costs_what_its_profile_says(tmp_path: Path) -> None:
    model, batches = family_of("t5-encoder")
    without_dropout(model)
    profile = gtflops.profile(model, batches[0])
    mask = profile.mask(top(profile, 0))
    log = trainer_for(model, batches, tmp_path, choose=top).fit(batches, epochs=2)
    assert log.planned_flops / 6 == pytest.approx(profile.form("flops", 2).total(mask), abs=len(profile.blocks))
    assert log.selections[0].held == profile.step_flops(mask, reuse="prefix").blocks


def test_the_boundary_is_held_until_moving_it_pays(tmp_path: Path) -> None:
    """Importance moves from the last layer to the first, in the second of many epochs."""
    model, batches = family_of("llama")
    measure = measuring([only(2), only(2), only(0), only(0), only(2), only(2)])
    trainer = trainer_for(model, batches, tmp_path, budget=0.7, measure=measure)
    log = trainer.fit(batches, epochs=6)
    depths = [len(record.held) for record in log.selections]
    assert depths[:2] == [2, 2]
    assert depths[2] == 0
    assert str(log.selections[1].reason).startswith("keeping what is stored")
    assert "storing anew" in str(log.selections[2].reason)
    assert "nothing is stored" in str(log.selections[2].reason)
    assert depths[4] == 2, "where two epochs are left, what is higher is stored again"
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert log.planned_flops <= 0.7 * log.full_flops


def test_a_boundary_moves_at_the_start_of_an_epoch_only(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    measure = measuring([only(2), only(0), only(0), only(0), only(0), only(0), only(0), only(0), only(0)])
    trainer = trainer_for(model, batches, tmp_path, budget=0.7, every=1, measure=measure)
    log = trainer.fit(batches, epochs=3)
    assert [len(record.held) for record in log.selections] == [2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert log.planned_flops <= 0.7 * log.full_flops


def test_a_selection_within_an_epoch_is_made_again_at_the_start_of_the_next(tmp_path: Path) -> None:
    """Where no multiple of ``every`` falls on it: the boundary would stay."""
    model, batches = family_of("llama")
    measure = measuring([only(2)] + [only(0)] * 20)
    trainer = trainer_for(model, batches, tmp_path, budget=0.7, every=2, measure=measure)
    left: list[int] = []
    log = trainer.fit(batches, epochs=4, on_step=lambda _: left.append(trainer._selections_left()))
    held = [(record.step, len(record.held)) for record in log.selections]
    assert held == [(0, 2), (2, 2), *((step, 0) for step in (3, 4, 6, 8, 9, 10))]
    assert left == [sum(step > made for step, _ in held) for made in range(1, 13)]
    log = trainer_for(model, batches, None, budget=0.7, every=2, measure=measuring([only(0)] * 20)).fit(batches, 2)
    assert [record.step for record in log.selections] == [0, 2, 4], "without reuse, there is none to move"


def test_full_training_has_nothing_to_reuse(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    log = trainer_for(model, batches, tmp_path, budget=None).fit(batches, epochs=2)
    assert log.planned_flops == log.full_flops == log.executed_flops
    assert log.selections[0].held == ()


def test_one_epoch_has_nothing_to_reuse(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    trainer = trainer_for(model, batches, tmp_path, budget=0.6)
    log = trainer.fit(batches, epochs=9, num_steps=4)  # the second epoch is not a whole one
    assert log.selections[0].held == ()
    assert log.selections[0].selection is not None
    assert not log.selections[0].selection.reuses
    assert log.planned_flops <= 0.6 * log.full_flops
    for length in ({"epochs": 1}, {"epochs": 2, "num_steps": 4}):
        trainer = trainer_for(model, batches, tmp_path, budget=0.3)
        with pytest.raises(InfeasibleBudgetError, match="only where an epoch begins that whole ones follow: not here"):
            trainer.fit(batches, **length)


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
def test_a_store_without_room_costs_more_and_the_budget_holds(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    store = ActivationStore(tmp_path, max_bytes=4000)
    trainer = trainer_for(model, batches, store, budget=0.6)
    with pytest.warns(UserWarning, match="takes no more activations"):
        log = trainer.fit(batches, epochs=5)
    assert any(not step.reused for step in log.steps[3:])
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert log.planned_flops <= 0.6 * log.full_flops


def test_flipped_bytes_are_computed_again(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    without_dropout(model)
    expected, found = copy.deepcopy(model), copy.deepcopy(model)
    trainer_for(expected, batches, None, choose=top).fit(batches, epochs=3)

    def flip(record: Any) -> None:
        if record.step == 3:
            for path in sorted(tmp_path.rglob("*.safetensors"))[::2]:
                content = bytearray(path.read_bytes())
                content[-5] ^= 1
                path.write_bytes(content)

    log = trainer_for(found, batches, tmp_path, choose=top).fit(batches, epochs=3, on_step=flip)
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert not all(step.reused for step in log.steps[4:6])
    assert all(step.reused for step in log.steps[7:])
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_batch_that_fails_owes_nothing(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    bad = {**batches[1], "input_ids": batches[1]["input_ids"] + 1000}
    trainer = trainer_for(model, batches, tmp_path)
    with pytest.raises(gtflops.GtflopsError, match="step 1 failed"):
        trainer.fit([batches[0], bad, batches[2]], epochs=3)
    assert len(trainer.log.steps) == 1
    spent = trainer.state_dict()
    assert spent["spent"] == trainer.log.planned_flops
    assert 0 < spent["reusing"]["owed_ahead"] < trainer.log.steps[0].planned_flops
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reuse": "prefix"}, "expected store, a folder"),
        ({"store": "somewhere"}, "without reuse='prefix'"),
        ({"batch_first": True}, "without reuse='prefix'"),
        ({"reuse": "suffix", "store": "somewhere"}, "'suffix', expected 'prefix'"),
        ({"reuse": "prefix", "store": ""}, "folder for activations is '', expected a path"),
        ({"reuse": "prefix", "store": 5}, "folder for activations is 5, expected a path"),
    ],
)
def test_arguments(options: dict[str, Any], match: str) -> None:
    model, batches = family_of("llama")
    with pytest.raises(InputError, match=match):
        gtflops.GreenTrainer(model, torch.optim.SGD(model.parameters()), batches[0], **options)


def test_a_run_of_unknown_length(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    with pytest.raises(InputError, match="expected num_steps and num_epochs"):
        trainer_for(model, batches, tmp_path).step_boundary(batches[0])
    with pytest.raises(InputError, match="expected num_steps and num_epochs"):
        trainer_for(model, batches, tmp_path).fit(iter(batches))


def test_a_model_without_blocks_says_so(tmp_path: Path) -> None:
    """What is below stands in no list of modules: there is nothing to hold."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())

    batches = [torch.randn(2, 4) for _ in range(3)]
    with pytest.raises(UnsupportedModelError, match=r"Two has no blocks .* expected a ModuleList"):
        trainer_for(Two(), batches, tmp_path, budget=0.8, loss=lambda y, x: y.sum())


# --- other loops --------------------------------------------------------------------------------------------------


def test_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    model, batches = family_of("opt")
    without_dropout(model)
    expected = copy.deepcopy(model)
    trainer_for(expected, batches, None, choose=top).fit(batches, epochs=2)
    trainer = trainer_for(model, batches, tmp_path, choose=top, num_steps=6, num_epochs=2)
    for epoch in range(2):
        for batch in batches:
            record = trainer.step_boundary(batch, epoch=epoch)
            with gtflops.ExecutedFlops() as executed:
                with trainer.forward_pass():
                    loss = model(**batch).loss
                loss.backward()
            assert executed.total == record.planned_flops
            assert record.reused == (epoch == 1)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_forward_pass_without_the_trainer(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    trainer = trainer_for(model, batches, tmp_path, choose=top, num_steps=6, num_epochs=2)
    trainer.step_boundary(batches[0])
    model(**batches[0]).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    with pytest.raises(InputError, match=r"with trainer\.forward_pass"):
        trainer.step_boundary(batches[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_in_the_trainer_planned_is_executed(kind: str, tmp_path: Path) -> None:
    from test_trainer_callback import MODELS

    embeddings = {"t5": "shared*", "gpt2": "*.w[tp]e.*"}.get(kind, "*embed*")
    callback = GreenTrainerCallback(0.4, must_freeze=embeddings, reuse="prefix", store=tmp_path / "store")
    trainer = trainer_of(MODELS[kind](), tmp_path, callback, kind=kind, lengths=(11, 7), num_train_epochs=4)
    trainer.train()
    log = callback.log
    assert [step.planned_flops for step in log.steps] == trainer.executed
    assert log.planned_flops <= 0.4 * log.full_flops
    assert log.selections[0].held
    assert [step.reused for step in log.steps] == [False] * 6 + [True] * 18
    assert all(tensor.requires_grad for tensor in trainer.model.parameters())


def test_in_the_trainer_a_number_of_steps_that_is_whole_epochs(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(0.3, reuse="prefix", store=tmp_path / "store")
    trainer_of(small_models.build("llama"), tmp_path, callback, max_steps=12).train()
    assert [step.reused for step in callback.log.steps] == [False] * 6 + [True] * 6
    assert callback.log.planned_flops <= 0.3 * callback.log.full_flops


def test_in_the_trainer_weights_are_those_without_reuse(tmp_path: Path) -> None:
    found = []
    for number, reuse in enumerate(({}, {"reuse": "prefix", "store": tmp_path / "store"})):
        torch.manual_seed(0)
        model = small_models.build("llama")
        callback = GreenTrainerCallback(choose=top, **reuse)  # type: ignore[arg-type]
        trainer = trainer_of(
            model,
            tmp_path / str(number),
            callback,
            num_train_epochs=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
        )
        trainer.train()
        assert any(step.reused for step in callback.log.steps) == bool(reuse)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_in_the_trainer_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def run(folder: Path, *, until: int | None = None, resume: bool = False) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = small_models.build("opt")

        class Stop(Counting):
            def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                if until is not None and self.state.global_step >= until and "backward" not in vars(self.accelerator):
                    raise KeyboardInterrupt
                return super().training_step(*args, **kwargs)

        callback = GreenTrainerCallback(0.5, must_freeze=["*embed*"], reuse="prefix", store=folder / "store")
        trainer = trainer_of(
            model, folder, callback, trainer=Stop, num_train_epochs=3, save_strategy="steps", save_steps=2, seed=3
        )
        if until is None:
            trainer.train(resume_from_checkpoint=resume or None)
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        return model.state_dict(), callback.log

    whole, log = run(tmp_path / "whole")
    run(tmp_path / "cut", until=9)
    resumed, log_of_resumed = run(tmp_path / "cut", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert [step.planned_flops for step in log_of_resumed.steps] == [step.planned_flops for step in log.steps]


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_stores_goes_on_to_the_bit(tmp_path: Path) -> None:
    expected = last_line(start(tmp_path / "whole", "--store", str(tmp_path / "store-of-whole")))
    assert any((tmp_path / "store-of-whole").rglob("*.safetensors"))
    printed, errors = start(tmp_path / "killed", "--kills", "20", "--store", str(tmp_path / "store")).communicate(
        timeout=500
    )
    lines = printed.split("\n")
    assert lines.count("killed") == 20, errors
    assert lines[-2] == expected, errors


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """The log too, which an interruption between steps leaves as it would be."""
    logs = []
    for name, at in (("whole", None), ("cut", 4)):
        model, batches = family_of("gpt2")
        options: dict[str, Any] = {"checkpoints": tmp_path / name}

        def interrupt(record: Any, at: int | None = at) -> None:
            if record.step == at:
                os.kill(os.getpid(), signal.SIGINT)

        trainer = trainer_for(model, batches, tmp_path / f"store-{name}", budget=0.5)
        trainer.fit(batches, epochs=4, on_step=interrupt, **options)
        if at is not None:
            assert len(trainer.log.steps) == 5
            model, batches = family_of("gpt2")
            trainer = trainer_for(model, batches, tmp_path / f"store-{name}", budget=0.5)
            trainer.fit(batches, epochs=4, resume=True, **options)
        logs.append((trainer.log, model.state_dict()))
    (whole, weights), (resumed, weights_of_resumed) = logs
    assert [step.planned_flops for step in resumed.steps] == [step.planned_flops for step in whole.steps]
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    for name, tensor in weights.items():
        assert torch.equal(weights_of_resumed[name], tensor), name


# --- budgets that find out by themselves ----------------------------------------------------------------------------


def test_auto_goes_by_importance_per_flop_with_reuse(tmp_path: Path) -> None:
    """Where all importance is in the last layer, and later in the first."""
    model, batches = family_of("llama")
    measure = measuring([only(2), only(2), only(0), only(0), only(0)])
    log = trainer_for(model, batches, tmp_path, budget="auto", measure=measure).fit(batches, epochs=5)
    assert [len(record.held) for record in log.selections] == [2, 2, 0, 0, 0]
    assert "x what storing anew brings" in str(log.selections[1].reason)
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]


def test_auto_with_a_total_never_exceeds_it(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    total = Total(flops=60_000_000)
    log = trainer_for(model, batches, tmp_path, budget=Auto(total)).fit(batches, epochs=6)
    assert 0.8 * 60_000_000 < log.planned_flops + log.measuring_flops <= 60_000_000


@pytest.mark.parametrize("full_steps", [3.9, 4.6])
def test_auto_with_a_rest_of_less_than_a_step_ends(full_steps: float, tmp_path: Path) -> None:
    """Held against what storing anew brings, it was divided by the steps that the rest pays for."""
    model, batches = family_of("llama")
    total = int(full_steps * gtflops.profile(model, batches[0]).full_flops)
    trainer = trainer_for(model, batches, tmp_path, budget=Auto(Total(flops=total)), measure=measuring([only(2)] * 8))
    log = trainer.fit(batches, epochs=6)
    assert str(log.stopped).startswith(f"Total(flops={total}) is spent")
    assert log.planned_flops + log.measuring_flops <= total
    assert not any("for 0 steps" in str(record.reason) for record in log.selections)


# --- and without padding ------------------------------------------------------------------------------------------


def with_few_labels(batches: list[Batch]) -> list[Batch]:
    """Padded to more columns than any row has, with labels at the end of each row alone."""
    wider = []
    for batch in batches:
        made = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in batch.items()}
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"].cumsum(1) < 4, -100)
        made["labels"][made["attention_mask"] == 0] = -100
        wider.append(made)
    return wider


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trimmed_and_reused(family: str, tmp_path: Path) -> None:
    """Of what is left, planned is executed, and the losses are those of the whole batches."""
    found = []
    for number, options in enumerate(({}, {"trim": "auto"})):
        model, batches = family_of(family)
        without_dropout(model.double())
        batches = with_few_labels(batches)
        trainer = trainer_for(model, batches, tmp_path / str(number), choose=top, **options)
        log = trainer.fit(batches, epochs=3)
        assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
        assert [step.reused for step in log.steps] == [False] * 3 + [True] * 6
        found.append(([step.loss for step in log.steps], log.planned_flops))
    (losses, all_flops), (losses_of_trimmed, flops) = found
    assert flops < 0.8 * all_flops
    assert losses_of_trimmed == pytest.approx(losses, rel=1e-5)  # AdamW makes a step of gradients that are rounding
    assert min(losses[-3:]) < min(losses[:3]) - 0.01


def test_in_the_trainer_trimmed_and_reused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = GreenTrainerCallback(0.5, reuse="prefix", store=tmp_path / "store", trim="auto")
    trainer = trainer_of(small_models.build("llama"), tmp_path, callback, lengths=(11, 7), num_train_epochs=4)
    trainer.train()
    assert [step.planned_flops for step in callback.log.steps] == trainer.executed
    assert callback.log.planned_flops <= 0.5 * callback.log.full_flops
    assert all(step.reused for step in callback.log.steps[6:])


# --- found by a second reader ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
def test_a_short_batch_at_the_start_of_an_epoch(tmp_path: Path) -> None:
    """What is to be paid back is a share of the usual step, not of a batch of four columns."""
    model, _ = family_of("llama")
    long, short = small_models.padded_batch(3, 40), small_models.padded_batch(3, 7)
    short["attention_mask"][:] = 1
    trainer = trainer_for(model, [long], tmp_path, budget=0.3)
    log = trainer.fit(Turned([long, long, long, short]), epochs=4)
    assert log.planned_flops <= 0.3 * log.full_flops
    assert all(step.reused for step in log.steps[4:])


class Turned(list[Batch]):
    """Batches that begin with another one in each epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.insert(0, self.pop())


def test_a_limit_that_nothing_above_the_boundary_fits(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    measure = measuring([only(2), lambda name: float("norm" in name and "layers.0" in name), only(2)])
    log = trainer_for(model, batches, tmp_path, budget=0.8, max_elements=100, measure=norms(measure)).fit(
        batches, epochs=3
    )
    assert [len(record.held) for record in log.selections] == [2, 0, 0]


def norms(measure: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Importance in norms alone, which have few elements."""
    return lambda *a, **k: {name: value if "norm" in name else 0.0 for name, value in measure(*a, **k).items()}


def test_data_without_a_length(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from rows()

    batches = DataLoader(Stream(), 2, collate_fn=padded)
    model, _ = family_of("llama")
    with pytest.raises(InputError, match="expected num_steps and num_epochs"):
        trainer_for(model, batches, tmp_path).fit(batches, epochs=3, num_steps=5)
    log = trainer_for(model, batches, tmp_path, num_epochs=3).fit(batches, epochs=3, num_steps=18)
    assert [step.reused for step in log.steps] == [False] * 6 + [True] * 12
    assert log.planned_flops <= 0.4 * log.full_flops


def test_a_pass_on_another_batch_is_refused(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    trainer = trainer_for(model, batches, tmp_path, choose=top, num_steps=6, num_epochs=2)
    trainer.step_boundary(batches[0], batches[1])
    with pytest.raises(InputError, match="input_ids is not that of the batch"), trainer.forward_pass():
        model(**batches[1])
    assert not list(tmp_path.rglob("*.safetensors"))
    trainer.step_boundary(batches[0])  # the passes of a step that failed are forgotten


@pytest.mark.parametrize("reuse", [False, True])
def test_evaluation_in_a_training_step_is_the_trainers(reuse: bool, tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Distilling(Counting):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch._guards.detect_fake_mode([inputs["input_ids"]]) and not reuse:
                model.eval()
                seen.append((model.training, model.model.training))
                model.train()
                seen.append((model.training, model.model.training))
            return super().compute_loss(model, inputs, *args, **kwargs)

    options: Any = {"reuse": "prefix", "store": tmp_path / "store"} if reuse else {}
    callback = GreenTrainerCallback(0.6, must_freeze=["*embed*"], **options)
    trainer = trainer_of(small_models.build("opt"), tmp_path, callback, trainer=Distilling)
    trainer.train()
    assert set(seen) == (set() if reuse else {(False, False), (True, True)})
    assert callback.log.steps[-1].reused == reuse


# --- what is read above the boundary --------------------------------------------------------------------------------


def losses_with_and_without(
    model: Any, batches: Any, folder: Path, epochs: int = 2, **options: Any
) -> tuple[list[Any], list[Any], list[bool]]:
    """Of every step, and which were reused."""
    without_dropout(model)
    logs = []
    for store in (None, folder):
        trained = copy.deepcopy(model)
        logs.append(trainer_for(trained, batches, store, choose=top, **options).fit(batches, epochs=epochs))
        assert [step.planned_flops for step in logs[-1].steps] == [step.executed_flops for step in logs[-1].steps]
    without, with_reuse = ([step.loss for step in log.steps] for log in logs)
    return without, with_reuse, [step.reused for step in logs[1].steps]


def test_a_loss_of_ones_own_sees_padding_as_it_is(tmp_path: Path) -> None:
    model, batches = family_of("llama")
    own = lambda outputs, batch: outputs.logits.square().mean()  # noqa: E731
    without, with_reuse, reused = losses_with_and_without(model, batches, tmp_path, loss=own)
    assert with_reuse == without
    assert reused == [False] * 3 + [True] * 3, "of the same batches, all of it is stored"


def test_a_model_that_mixes_padding_in_sees_it_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ConvBertConfig(
        vocab_size=small_models.VOCABULARY,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=5,
        initializer_range=0.2,
    )
    model = transformers.ConvBertForTokenClassification(config).train()
    batches = []
    for seed in range(3):
        batch = other_examples(small_models.padded_batch(), seed)
        batches.append(batch | {"labels": (batch["input_ids"] % 5).masked_fill(batch["attention_mask"] == 0, -100)})
    without, with_reuse, reused = losses_with_and_without(model, batches, tmp_path)
    assert with_reuse == without
    assert reused == [False] * 3 + [True] * 3


def test_a_loss_of_ones_own_beside_longer_examples_says_why_nothing_is_reused(tmp_path: Path) -> None:
    model, (batch, *_) = family_of("llama")
    longer = {name: torch.nn.functional.pad(tensor, (0, 1)) for name, tensor in batch.items()}
    own = lambda outputs, batch: outputs.logits.square().mean()  # noqa: E731
    trainer = trainer_for(model, [batch], tmp_path, choose=top, loss=own)
    with pytest.warns(UserWarning, match=r"the loss is one of your own.*padded to one length"):
        log = trainer.fit(Changing([batch], [longer]), epochs=2)
    assert [step.reused for step in log.steps] == [False, False]


class Changing(list[Batch]):
    """Batches of the first epoch, and of the later ones."""

    def __init__(self, first: list[Batch], later: list[Batch]) -> None:
        super().__init__(first)
        self._later = later

    def set_epoch(self, epoch: int) -> None:
        if epoch:
            self[:] = self._later


def square(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    value: torch.Tensor = outputs.logits.square().mean()
    return value


class OwnLoss(Counting):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return square(model(**{name: value for name, value in inputs.items() if name != "labels"}), None)


@pytest.mark.parametrize("kind", ["method", pytest.param("function", marks=pytest.mark.slow)])
def test_in_the_trainer_a_loss_of_ones_own_sees_padding_as_it_is(kind: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"trainer": OwnLoss} if kind == "method" else {"compute_loss_func": square}
    losses = []
    for number, reuse in enumerate(({}, {"reuse": "prefix", "store": tmp_path / "store"})):
        torch.manual_seed(0)
        callback = GreenTrainerCallback(choose=top, **reuse)  # type: ignore[arg-type]
        arguments = {"lengths": (11, 7), "learning_rate": 1e-3, **own}
        trainer = trainer_of(small_models.build("llama"), tmp_path / str(number), callback, **arguments)
        trainer.train()
        assert [step.planned_flops for step in callback.log.steps] == trainer.executed
        assert any(step.reused for step in callback.log.steps) == bool(reuse)
        losses.append(trainer.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_in_the_trainer_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = loader("vit")
    callback = GreenTrainerCallback(choose=top, reuse="prefix", store=tmp_path / "store")
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train_dataset, trainer.data_collator = batches.dataset, torch.utils.data.default_collate
    trainer.train()
    assert [step.planned_flops for step in callback.log.steps] == trainer.executed
    assert [step.reused for step in callback.log.steps] == [False] * 6 + [True] * 6


class Stack(torch.nn.Module):
    """Blocks without names that transformers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(x)
        return result


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
@pytest.mark.parametrize("batch_first", [False, True])
def test_shuffled_batches_of_ones_own(batch_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = DataLoader(torch.randn(12, 8), 2, shuffle=True)  # type: ignore[arg-type]
    trainer = trainer_for(
        Stack(), batches, tmp_path, budget=0.3, loss=lambda y, x: y.square().mean(), batch_first=batch_first
    )
    if batch_first:
        log = trainer.fit(batches, epochs=5)
        assert log.executed_flops == log.planned_flops <= 0.3 * log.full_flops
        assert [step.reused for step in log.steps] == [False] * 6 + [True] * 24
    else:
        with pytest.warns(UserWarning, match=r"the whole batch is one; .*batch_first=True"):
            log = trainer.fit(batches, epochs=5)
        assert log.executed_flops == log.planned_flops


def llava() -> tuple[Any, list[Batch]]:
    """It takes the last but one hidden state of its vision tower."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=96, vision_feature_layer=-2, image_seq_length=4
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).train()
    model.set_attn_implementation("eager")
    model.model.vision_tower.requires_grad_(False)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, 90, (2, 12))
        ids[:, 1:5] = 96
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(2, 3, 16, 16),
                "labels": ids.masked_fill(ids == 96, -100),
            }
        )
    return model, batches


def test_a_frozen_vision_tower(tmp_path: Path) -> None:
    """Up to the layer whose hidden state is taken, with the embeddings of the text trained."""
    model, batches = llava()
    trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    blocks = [f"model.vision_tower.encoder.layers.{index}" for index in range(2)]
    assert gtflops.profile(model, batches[0]).step_flops(trained, reuse="prefix").blocks == tuple(blocks)
    found = []
    for store in (None, tmp_path):
        its = copy.deepcopy(model)
        choose = lambda profile, step: [name for name in profile.names if name in trained]  # noqa: E731
        log = trainer_for(its, batches, store, choose=choose).fit(batches, epochs=2)
        assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
        assert [step.reused for step in log.steps] == [False] * 2 + [store is not None] * 2
        found.append(its.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
