"""The loop: frozen tensors do not move, FLOPs are what was executed, bad input is refused."""

import copy
import gc
import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import gtflops
from gtflops.sources import Live
from gtflops.training import EnergyMeter, JsonLines, Total, TrainingLog, read_log
from real_steps import counted_by_pytorch
from small_models import build, padded_batch


def trainer_for(family: str = "llama", **options: Any) -> tuple[gtflops.GreenTrainer, list[dict[str, torch.Tensor]]]:
    model = build(family)
    batches = [padded_batch() for _ in range(6)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return gtflops.GreenTrainer(model, optimizer, batches[0], **{"budget": 0.6, "every": 2, **options}), batches


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_frozen_tensors_do_not_move_by_a_bit(family: str) -> None:
    trainer, batches = trainer_for(family)
    moved_ever: set[str] = set()
    for start in range(0, 6, 2):
        before = copy.deepcopy(dict(trainer.model.named_parameters()))
        trainer.fit(batches[start : start + 2])
        assert trainer.selection is not None
        for name, tensor in trainer.model.named_parameters():
            assert torch.equal(tensor, before[name]) == (name not in trainer.selection.names), name
        moved_ever.update(trainer.selection.names)
    assert len(trainer.log.selections) == 3
    assert {record.step for record in trainer.log.selections} == {0, 2, 4}


def test_planned_flops_are_executed() -> None:
    trainer, batches = trainer_for("opt", count_executed=True)
    log = trainer.fit(batches)
    assert log.executed_flops == log.planned_flops == sum(step.planned_flops for step in log.steps)
    assert all(step.planned_flops <= 0.6 * trainer.profile.full_flops for step in log.steps)
    matmul = trainer.profile.step_flops(trainer.model, ops="matmul")
    assert counted_by_pytorch(trainer.model, batches[0]) == (matmul.forward, matmul.backward)
    assert log.measuring_flops == 3 * trainer.profile.full_flops + len(log.checked) * trainer.profile.forward_flops


def test_accumulating_gradients_has_a_cost() -> None:
    """Each batch after the first adds its gradients, element by element, to those that are there."""
    trainer, batches = trainer_for(count_executed=True, budget=0.7)
    log = trainer.fit([*batches[:4], padded_batch(2, 12), *batches[4:]], accumulate=3)
    assert [step.executed_flops for step in log.steps] == [step.planned_flops for step in log.steps]
    assert log.planned_flops <= 0.7 * log.full_flops
    one = trainer.profile.step_flops(log.selections[0].names).total
    added = sum(tensor.numel for tensor in trainer.profile.tensors if tensor.name in log.selections[0].names)
    assert log.steps[0].planned_flops == 3 * one + 2 * added


def test_a_new_shape_is_priced_by_its_own_profile() -> None:
    trainer, batches = trainer_for(count_executed=True)
    log = trainer.fit([batches[0], padded_batch(2, 12), padded_batch(3, 20), batches[1]])
    assert [step.executed_flops for step in log.steps] == [step.planned_flops for step in log.steps]
    assert len({step.planned_flops for step in log.steps}) > 1


def test_the_budget_holds_for_the_shape_it_is_selected_on() -> None:
    """Attention's share grows with length, so a share of one shape's full step is another share of another's."""
    trainer, _ = trainer_for(budget=0.5, every=1, count_executed=True)
    for batch in (padded_batch(3, 60), padded_batch(3, 12)):
        record = trainer.fit([batch]).steps[-1]
        assert record.executed_flops == record.planned_flops
        assert record.planned_flops <= 0.5 * gtflops.profile(trainer.model, batch).full_flops


def test_plain_values_and_modes_have_profiles_of_their_own() -> None:
    class Repeated(torch.nn.Linear):
        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            for _ in range(times):
                x = torch.nn.functional.dropout(super().forward(x), training=self.training)
            return x

    model, x = Repeated(4, 4), torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = gtflops.GreenTrainer(
        model, optimizer, (x, 1), 1.0, 9, loss=lambda y, _: y.square().mean(), count_executed=True
    )
    trainer.fit([(x, 1), (x, 4)])
    model.eval()
    log = trainer.fit([(x, 4)])
    assert [step.planned_flops for step in log.steps] == [step.executed_flops for step in log.steps]
    assert len({step.planned_flops for step in log.steps}) == 3


def test_what_is_frozen_stays_frozen() -> None:
    model, batch = build("gpt2"), padded_batch()
    frozen = {name for name, _ in model.named_parameters() if "wte" in name or "h.0" in name}
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name not in frozen)
    for optimizer in (
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-2),
    ):
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(name not in frozen)
        before = copy.deepcopy(dict(model.named_parameters()))
        trainer = gtflops.GreenTrainer(model, optimizer, batch, budget=0.9, every=2, count_executed=True)
        log = trainer.fit([batch] * 4)
        assert log.executed_flops == log.planned_flops
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters() if name in frozen)
        assert not frozen & set(log.selections[-1].selection.names)


def test_a_warm_up_from_zero() -> None:
    model, batch = build("gpt2"), padded_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    expected = gtflops.measure_importance(model.eval(), [batch], torch.optim.AdamW(model.parameters(), lr=5e-4))  # half
    trainer = gtflops.GreenTrainer(model, optimizer, batch, 0.7, 2, scheduler=scheduler)
    trainer.fit([batch] * 3)
    assert trainer.log.measuring_flops == 2 * (trainer.profile.full_flops + trainer.profile.forward_flops)
    assert dict(trainer.log.selections[0].selection.importance) == expected


def test_operators_without_a_price_are_refused_or_allowed() -> None:
    class Exponential(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ torch.linalg.matrix_exp(self.weight)

    model = Exponential(4, 4)
    optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(8, 4)
    options: dict[str, Any] = {"loss": lambda y, _: y.square().mean(), "count_executed": True}
    for budget in (None, 0.9):
        with pytest.raises(gtflops.UnsupportedOperatorError, match=r"aten\.linalg_matrix_exp"):
            gtflops.GreenTrainer(model, optimizer, x, budget, **options)
    log = gtflops.GreenTrainer(model, optimizer, x, 0.9, allow_unsupported=True, **options).fit([x])
    assert log.executed_flops == log.planned_flops
    with gtflops.ExecutedFlops() as executed:
        model(x)
    with pytest.raises(gtflops.UnsupportedOperatorError, match=r"aten\.linalg_matrix_exp\.default \(1 times\)"):
        _ = executed.total


def test_a_scheme_of_its_own_chooses_what_is_trained() -> None:
    def by_turns(profile: gtflops.Profile, step: int) -> list[str]:
        return [name for name in profile.names if f"layers.{step // 2 % 3}." in name]

    trainer, batches = trainer_for(choose=by_turns, count_executed=True)
    log = trainer.fit(batches)
    assert [record.names[0].split(".")[2] for record in log.selections] == ["0", "1", "2"]
    assert log.executed_flops == log.planned_flops < log.full_flops
    assert log.measuring_flops == 0


def test_a_profile_of_another_model() -> None:
    profile = gtflops.profile(torch.nn.Linear(8, 8), torch.ones(2, 8), lambda y, _: y.sum())
    model = torch.nn.Linear(4, 4)
    with pytest.raises(gtflops.InputError, match=r"of shape \(8,\), the model \(4,\); expected the model that was"):
        gtflops.GreenTrainer(model, torch.optim.AdamW(model.parameters()), profile)


def test_a_model_that_is_all_frozen() -> None:
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(gtflops.InputError, match="nothing to select from"):
        gtflops.GreenTrainer(
            model, torch.optim.SGD(model.parameters(), lr=1.0), torch.ones(1, 4), loss=lambda y, _: y.sum()
        )


def test_without_a_budget_everything_is_trained() -> None:
    trainer, batches = trainer_for(budget=None, count_executed=True)
    trainer.model.requires_grad_(False)
    log = trainer.fit(batches[:2])
    assert [record.selection for record in log.selections] == [None]
    assert log.executed_flops == log.full_flops == 2 * trainer.profile.full_flops


def test_measuring_does_not_change_the_run() -> None:
    """With everything selected, the losses are those of a plain loop: selecting draws nothing from the RNG."""

    def plain() -> list[float]:
        torch.manual_seed(0)
        model, batch = build("opt"), padded_batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    model, batch = build("opt"), padded_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    log = gtflops.GreenTrainer(model, optimizer, batch, budget=1.0, every=1).fit([batch] * 3)
    assert [step.loss for step in log.steps] == plain()


def test_a_saved_profile_and_a_scheduler() -> None:
    model, batch = build("gpt2"), padded_batch()
    profile = gtflops.profile(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    trainer = gtflops.GreenTrainer(model, optimizer, profile, 0.7, 4, scheduler=scheduler)
    trainer.fit([batch] * 3)
    assert trainer.profile is profile
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


def test_training_lowers_the_loss() -> None:
    trainer, batches = trainer_for(budget=0.6, every=5)
    log = trainer.fit([batches[0]] * 30)
    assert log.steps[-1].loss < 0.8 * log.steps[0].loss


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "epochs"])
def test_every_must_be_a_number_of_steps(every: Any) -> None:
    with pytest.raises(gtflops.InputError, match="expected a positive number of optimizer steps, 'epoch'"):
        trainer_for(every=every)


@pytest.mark.parametrize("budget", [0, 1.1, -1])
def test_budgets_outside_zero_to_one(budget: float) -> None:
    with pytest.raises(gtflops.InputError, match=r"expected a share of a full step in \(0, 1\]"):
        trainer_for(budget=budget)


def test_an_infeasible_budget_trains_nothing() -> None:
    trainer, batches = trainer_for(budget=0.2)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(gtflops.InfeasibleBudgetError, match="smallest feasible budget"):
        trainer.fit(batches)
    assert trainer.log.steps == []
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(tensor.requires_grad for tensor in trainer.model.parameters())


def test_a_loss_that_is_nan_keeps_the_weights() -> None:
    trainer, batches = trainer_for(budget=None)
    trainer.loss = lambda outputs, _: outputs.loss * float("nan")
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(gtflops.GtflopsError, match="the loss is nan at step 0"):
        trainer.fit(batches)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# --- loops of one's own, and batches of any shape ---------------------------------------------------------------


def ragged(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = random.Random(seed)
    return [padded_batch(3, draw.randint(9, 60)) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_budget_holds_on_the_sum_over_steps_of_any_shape(family: str) -> None:
    """Selected on the first batch only: a short one, of which the same tensors are a smaller share."""
    model, batches = build(family), [padded_batch(3, 9), *ragged(11)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = gtflops.GreenTrainer(model, optimizer, batches[0], 0.5, 100, count_executed=True)
    log = trainer.fit(batches)
    assert [step.executed_flops for step in log.steps] == [step.planned_flops for step in log.steps]
    assert len(log.selections) == 1
    for steps in range(1, len(log.steps) + 1):
        made = log.steps[:steps]
        assert sum(step.planned_flops for step in made) <= 0.5 * sum(step.full_flops for step in made)
    for step, batch in zip(log.steps, batches, strict=True):
        assert step.full_flops == gtflops.profile(model, batch).full_flops


def test_most_shapes_are_priced_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = 0
    trace = Live.trace

    def counted(self: Live, sizes: Any) -> Any:
        nonlocal traced
        traced += 1
        return trace(self, sizes)

    monkeypatch.setattr(Live, "trace", counted)
    model = build("llama")
    trainer = gtflops.GreenTrainer(model, torch.optim.AdamW(model.parameters()), padded_batch(3, 60), None)
    trainer.fit(ragged(20))
    assert len({step.planned_flops for step in trainer.log.steps}) > 12
    assert traced <= 4  # a short one, a long one, the first asked for, and one to check the polynomials


def test_a_loop_of_ones_own_is_as_the_loop_written_out() -> None:
    def losses(own: bool) -> tuple[list[float], list[int]]:
        torch.manual_seed(0)
        trainer, batches = trainer_for(every=2)
        if not own:
            log = trainer.fit(batches)
            return [step.loss or 0.0 for step in log.steps], [step.planned_flops for step in log.steps]
        seen = []
        for batch in batches:
            trainer.step_boundary(batch)
            loss = trainer.model(**batch).loss
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            seen.append(loss.item())
        return seen, [step.planned_flops for step in trainer.log.steps]

    assert losses(own=True) == losses(own=False)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    rows = padded_batch(6, 12)
    rows["attention_mask"].fill_(1)
    rows["labels"] = rows["input_ids"]
    halves = [{name: tensor[part] for name, tensor in rows.items()} for part in (slice(0, 3), slice(3, 6))]
    weights = []
    for batches, accumulate in (([rows], 1), (halves, 2)):
        torch.manual_seed(1)
        model = build("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = gtflops.GreenTrainer(model, optimizer, batches[0], None, count_executed=True)
        log = trainer.fit(batches, accumulate=accumulate)
        assert len(log.steps) == 1
        assert log.executed_flops == log.planned_flops
        weights.append(torch.cat([tensor.detach().flatten() for tensor in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1])


def test_importance_is_averaged_over_batches_to_come() -> None:
    trainer, batches = trainer_for("llama")
    expected = gtflops.measure_importance(trainer.model, batches[:3], trainer.optimizer)
    first = trainer.fit(batches, measure_on=3).selections[0].selection
    assert first is not None
    assert dict(first.importance) == pytest.approx(expected)
    # Two batches are left at the end.
    costs = trainer.profile
    checks = len(trainer.log.checked)
    assert trainer.log.measuring_flops == (3 + 3 + 2) * costs.full_flops + checks * costs.forward_flops


def test_selecting_every_epoch_or_when_a_function_says_so() -> None:
    trainer, batches = trainer_for(every="epoch")
    assert [record.step for record in trainer.fit(batches[:3], epochs=2).selections] == [0, 3]
    trainer, batches = trainer_for(every=lambda step: step in (2, 5))
    assert [record.step for record in trainer.fit(batches).selections] == [0, 2, 5]


@pytest.mark.parametrize("every", [1, 2, 7, 100])
def test_how_many_selections_are_left_is_known_without_counting(every: int) -> None:
    """For a number and for a function alike; which is asked once of each step, however often is selected."""
    asked = 0

    def due(step: int) -> bool:
        nonlocal asked
        asked += 1
        return step % every == 0

    for num_steps in (None, 0, 1, 30):
        by_number, _ = small_trainer(every=every, num_steps=num_steps)
        by_function, _ = small_trainer(every=due, num_steps=num_steps)
        asked = 0
        for made in range(40):
            by_number.log.steps = by_function.log.steps = [None] * made  # type: ignore[list-item]
            left = sum(step % every == 0 for step in range(made + 1, num_steps or 0))
            assert by_number._selections_left() == by_function._selections_left() == left
        assert asked == (num_steps or 0)


def test_what_is_trained_changes_between_steps_only() -> None:
    trainer, batches = trainer_for(every=1)
    trainer.step_boundary(batches[0])
    trainer.model(**batches[0]).loss.backward()
    before = {name: tensor.requires_grad for name, tensor in trainer.model.named_parameters()}
    with pytest.raises(gtflops.InputError, match="gradient of an unfinished step"):
        trainer.step_boundary(batches[1])
    assert before == {name: tensor.requires_grad for name, tensor in trainer.model.named_parameters()}
    assert len(trainer.log.steps) == 1


def test_requires_grad_that_something_else_changes() -> None:
    trainer, batches = trainer_for()
    trainer.fit(batches[:1])
    frozen = next(name for name, tensor in trainer.model.named_parameters() if not tensor.requires_grad)
    trainer.model.get_parameter(frozen).requires_grad_(True)
    with pytest.raises(gtflops.InputError, match=f"'{frozen}' was thawed by something else"):
        trainer.step_boundary(batches[1])


def test_clipping() -> None:
    model, batch = build("llama"), padded_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([tensor.detach().flatten() for tensor in model.parameters()])
    gtflops.GreenTrainer(model, optimizer, batch, None, max_grad_norm=0.01).fit([batch])
    moved = torch.cat([tensor.detach().flatten() for tensor in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# --- budgets that move, and who watches -------------------------------------------------------------------------


def test_a_total_is_never_exceeded_and_nearly_spent() -> None:
    model, batches = build("llama"), ragged(12, seed=3)
    full = [gtflops.profile(model, batch).full_flops for batch in batches]
    total = int(0.7 * sum(full))
    trainer = gtflops.GreenTrainer(model, torch.optim.AdamW(model.parameters()), batches[0], Total(flops=total), 4)
    log = trainer.fit(batches)
    spent = log.planned_flops + log.measuring_flops
    assert 0.8 * total < spent <= total
    assert len({record.budget for record in log.selections}) > 1
    assert log.stopped is None or "is spent" in log.stopped


def test_a_run_ends_when_its_total_is_spent_and_says_so(tmp_path: Path) -> None:
    """The later batches are longer than those that the total was spread over."""
    model, batches = build("llama"), [padded_batch(3, 12)] * 6 + [padded_batch(3, 60)] * 6
    costs = gtflops.profile(model, batches[0])
    total = int(12 * 0.9 * costs.full_flops)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = gtflops.GreenTrainer(model, optimizer, costs, Total(flops=total), 100)
    log = trainer.fit(batches, checkpoints=tmp_path)
    assert log.stopped is not None
    assert log.stopped.startswith(f"Total(flops={total}) is spent")
    assert 6 <= len(log.steps) < 12
    assert log.planned_flops + log.measuring_flops <= total
    (saved,) = tmp_path.iterdir()
    assert saved.name == f"step-{len(log.steps):09d}"
    with pytest.raises(gtflops.BudgetSpentError, match="is spent"):
        trainer.step_boundary(batches[-1])


def test_a_list_is_a_budget_for_each_epoch() -> None:
    trainer, batches = trainer_for(budget=[0.5, None, 0.8], every=100)
    log = trainer.fit(batches, epochs=3)
    assert [(record.step, record.budget) for record in log.selections] == [(0, 0.5), (6, None), (12, 0.8)]
    full = trainer.profile.full_flops
    shares = [step.planned_flops / full for step in log.steps]
    assert max(shares[:6]) <= 0.5 < 0.8 < min(shares[6:12]) == 1.0 > 0.8 >= max(shares[12:])
    with pytest.raises(gtflops.InputError, match="the budget list has 3 entries and 4 epochs"):
        trainer.fit(batches, epochs=4)


def test_watchers_and_energy(tmp_path: Path) -> None:
    model, batches = build("gpt2"), [padded_batch() for _ in range(5)]
    meter = EnergyMeter(intensity=300.0, tracking="process")
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = gtflops.GreenTrainer(model, optimizer, batches[0], 0.6, 3, energy=meter)
    log = trainer.fit(batches, watchers=[JsonLines(tmp_path / "log.jsonl")])
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["record"] for line in lines] == ["selection", "step", "step", "step", "selection", "step", "step"]
    assert [line["planned_flops"] for line in lines if line["record"] == "step"] == [
        step.planned_flops for step in log.steps
    ]
    assert log.energy is not None
    assert log.energy.co2_kg == pytest.approx(log.energy.kwh * 0.3)
    assert log.energy.kwh > 0
    used = [step.kwh for step in log.steps]
    assert 0 < used[0] <= used[-1] <= log.energy.kwh
    assert used == sorted(used) == [line["kwh"] for line in lines if line["record"] == "step"]
    assert [step.co2_kg for step in log.steps] == pytest.approx([0.3 * kwh for kwh in used])
    captured = [line["importance_captured"] for line in lines if line["record"] == "selection"]
    assert captured == [record.selection.importance_captured for record in log.selections]
    saved = json.loads(json.dumps(log.to_json()))
    again = TrainingLog.from_json(saved, trainer.profile)
    assert again.steps == log.steps
    assert [record.importance_captured for record in again.selections] == captured
    for step in saved["steps"]:  # of a checkpoint from before there was energy by step
        del step["kwh"], step["co2_kg"]
    assert {step.kwh for step in TrainingLog.from_json(saved, trainer.profile).steps} == {None}


def test_the_estimate_is_checked_after_a_selection() -> None:
    """With dropout: both losses see the same random numbers."""
    model, batch = build("gpt2"), padded_batch()
    trainer = gtflops.GreenTrainer(model, torch.optim.SGD(model.parameters(), lr=1e-2), batch, 0.7, 2)
    log = trainer.fit([batch] * 4)
    first = log.steps[0]
    assert first.predicted_drop is not None
    assert first.real_drop == pytest.approx(first.predicted_drop, rel=0.1)
    assert first.check is not None
    assert first.check.holds
    costs = trainer.profile
    assert log.measuring_flops == 2 * costs.full_flops + costs.forward_flops


@pytest.mark.filterwarnings("ignore:step .* predicted drop")
def test_an_estimate_that_does_not_hold_is_checked_again() -> None:
    model, batch = build("gpt2"), padded_batch()
    trainer = gtflops.GreenTrainer(model, torch.optim.AdamW(model.parameters(), lr=0.5), batch, 0.7, 2)
    with pytest.warns(UserWarning, match="step 0: predicted drop .* the first-order estimate does not hold"):
        log = trainer.fit([batch] * 3)
    assert [step.check is not None for step in log.steps] == [True, False, True]


@pytest.mark.parametrize(
    ("rates", "checked"),
    [
        ((1, 1, 1, 1, 1, 1), [0, 4]),  # trusted for three steps
        ((1, 0.9, 0.8, 0.7, 0.6, 0.5), [0, 4]),
        ((0.1, 0.2, 0.4, 0.4, 0.4, 0.4), [0, 2]),  # a warm-up; nothing is selected at odd steps
    ],
)
def test_an_estimate_that_held_is_trusted_for_a_while(
    rates: tuple[float, ...], checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtflops.training.loop.TRUSTED_STEPS", 3)
    trainer, batches = small_trainer(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: (*rates, 0)[step])
    log = trainer.fit(batches)
    assert [record.step for record in log.selections] == [0, 2, 4]
    assert [step.step for step in log.checked] == checked


def test_checking_the_estimate_does_not_change_the_run() -> None:
    def run(*, checked: bool) -> list[float | None]:
        torch.manual_seed(0)
        model, batch = build("opt"), padded_batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        trainer = gtflops.GreenTrainer(model, optimizer, batch, 0.7, 1)
        for _ in range(3):
            trainer.select(batch)
            trainer._to_check = checked
            trainer.every = 100
            trainer.fit([batch])
        return [step.loss for step in trainer.log.steps]

    assert run(checked=True) == run(checked=False)


def test_a_loop_with_a_gradient_scaler() -> None:
    """Steps that it leaves out, for gradients that overflow, are executed all the same; the next one is checked."""
    model, batch = build("llama"), padded_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-14)
    half = torch.autocast("cpu", torch.float16)
    with half:
        trainer = gtflops.GreenTrainer(model, optimizer, batch, 0.6, 3)
    trainer.checks = True
    moved = []
    for _ in range(4):
        before = copy.deepcopy(dict(model.named_parameters()))
        with half:
            record = trainer.step_boundary(batch)
            with gtflops.ExecutedFlops() as executed:
                loss = model(**batch).loss
        with executed:
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        trainer.expect_drop()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with half:
            trainer.check_drop(loss.item())
        assert executed.total == record.planned_flops + 2  # the loss and its gradient, times the scale
        moved.append({name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])})
    first, second = trainer.log.selections
    assert moved == [set(), set(first.names), set(first.names), set(second.names)]
    assert [step.real_drop is not None for step in trainer.log.steps] == [False, True, False, False]  # it held
    for step in trainer.log.checked:
        assert step.real_drop == pytest.approx(step.predicted_drop, rel=0.1)


# --- what must not go wrong silently ----------------------------------------------------------------------------


def small_trainer(
    optimizer: Any = None, frozen: tuple[int, ...] = (), **options: Any
) -> tuple[gtflops.GreenTrainer, list[torch.Tensor]]:
    """A perceptron, which profiles in no time; modules 0 and 2 are its layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    for position in frozen:
        model[position].requires_grad_(False)
    batches = [torch.randn(16, 4) for _ in range(6)]
    made = torch.optim.AdamW(model.parameters(), lr=1e-3) if optimizer is None else optimizer(model)
    settings: dict[str, Any] = {"budget": 0.8, "every": 2, "loss": lambda outputs, _: outputs.square().mean()}
    return gtflops.GreenTrainer(model, made, batches[0], **{**settings, **options}), batches


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nothing"], "has no tensor 'nothing'; nearest"),
        ([], "choose gave 0 tensors and the loss depends on none of them"),
        (["0.weight", "2.weight"], "choose gave 1 tensors that were frozen .* built, first '0.weight'"),
    ],
)
def test_a_choice_that_cannot_be_trained_freezes_nothing(names: list[str], message: str) -> None:
    trainer, batches = small_trainer(frozen=(0,), choose=lambda profile, step: names)
    before = [tensor.requires_grad for tensor in trainer.model.parameters()]
    with pytest.raises(gtflops.InputError, match=message):
        trainer.fit(batches)
    assert before == [tensor.requires_grad for tensor in trainer.model.parameters()]
    assert not trainer.log.selections


def test_an_optimizer_that_lacks_tensors_is_refused_without_a_budget_too() -> None:
    with pytest.raises(gtflops.InputError, match=r"the optimizer does not hold 2 of 4 tensors, first '2\.weight'"):
        small_trainer(lambda model: torch.optim.AdamW(model[0].parameters()), budget=None)


def test_an_optimizer_that_finds_its_own_rate() -> None:
    adafactor = pytest.importorskip("transformers").Adafactor
    trainer, batches = small_trainer(lambda model: adafactor(model.parameters()))
    assert [step.learning_rate for step in trainer.fit(batches[:2]).steps] == [None, None]


def test_a_schedule_that_needs_a_metric_is_refused_before_the_first_step() -> None:
    trainer, batches = small_trainer()
    trainer.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer)  # type: ignore[assignment]
    with pytest.raises(gtflops.InputError, match=r"ReduceLROnPlateau cannot be stepped .*'metrics'"):
        trainer.fit(batches)
    assert not trainer.log.steps


def test_a_budget_that_ends_while_importance_is_measured() -> None:
    """It is asked before and after: what it says after counts."""
    trainer, batches = small_trainer(budget=lambda progress: None if progress.spent_flops else 0.8)
    log = trainer.fit(batches[:1])
    assert log.selections[0].budget is None
    assert log.planned_flops == log.full_flops == log.selections[0].flops
    assert set(log.selections[0].names) == trainer.candidates
    assert log.steps[0].predicted_drop is None


def test_a_total_in_a_loop_of_ones_own_is_spent_on_steps() -> None:
    """The estimate is checked in ``fit`` only, so nothing is kept back for it."""
    trainer, batches = small_trainer(every=100)
    trainer.step_boundary(batches[0])
    total = trainer.log.measuring_flops + 6 * trainer.log.planned_flops + 6  # the share is rounded down
    trainer, batches = small_trainer(every=100, budget=Total(flops=total), num_steps=6)
    for batch in batches:
        trainer.step_boundary(batch)
        trainer.model(batch).square().mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=False)
    assert trainer.log.planned_flops + trainer.log.measuring_flops == total - 6


def test_a_selection_that_failed_is_made_up_for() -> None:
    trainer, batches = small_trainer(every="epoch")
    trainer.fit(batches)
    with pytest.raises(gtflops.InputError, match="the loss is nan"):
        trainer.step_boundary(batches[0] * float("nan"), epoch=1)
    trainer.step_boundary(batches[0], epoch=1)
    trainer.step_boundary(batches[1], epoch=1)
    assert [record.step for record in trainer.log.selections] == [0, 6]


def test_a_second_fit_starts_an_epoch() -> None:
    trainer, batches = small_trainer(every="epoch")
    trainer.fit(batches)
    assert [record.step for record in trainer.fit(batches).selections] == [0, 6]


def test_a_step_that_cannot_be_clipped_is_none() -> None:
    trainer, batches = small_trainer(max_grad_norm="much")
    with pytest.raises((TypeError, ValueError)):
        trainer.fit(batches)
    assert not trainer.log.steps
    assert all(tensor.grad is None for tensor in trainer.model.parameters())


def test_zeroed_gradients_move_nothing_that_is_frozen() -> None:
    """With momentum and weight decay, a gradient of 0 would."""
    trainer, batches = small_trainer(every=1)
    for batch in batches:
        trainer.step_boundary(batch)
        before = copy.deepcopy(dict(trainer.model.named_parameters()))
        trainer.model(batch).square().mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=False)
        for name, tensor in trainer.model.named_parameters():
            assert torch.equal(tensor, before[name]) == (not tensor.requires_grad), name


def test_a_step_that_the_optimizer_refuses_is_none() -> None:
    trainer, batches = small_trainer(budget=None)
    trainer.fit(batches[:2])
    spent = trainer.state_dict()["spent"]

    def refuse(*_: Any) -> None:
        raise RuntimeError("no memory for its state")

    handle = trainer.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.fit(batches)
    assert len(trainer.log.steps) == 2
    assert trainer.state_dict()["spent"] == spent
    assert all(tensor.grad is None for tensor in trainer.model.parameters())
    handle.remove()
    assert len(trainer.fit(batches[:2]).steps) == 4


@pytest.mark.parametrize("to_none", [True, False])
def test_a_boundary_in_the_middle_of_a_step_is_noticed(to_none: bool) -> None:
    """Else every batch of an accumulation would be written down as a step."""
    trainer, batches = small_trainer(every=100)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        trainer.step_boundary(first, second)
        for batch in (first, second):
            trainer.model(batch).square().mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=to_none)
    trainer.step_boundary(batches[0])
    trainer.model(batches[0]).square().mean().backward()
    with pytest.raises(gtflops.InputError, match=r"gradient of an unfinished step; .* one step_boundary\(\*batches\)"):
        trainer.step_boundary(batches[1])
    assert len(trainer.log.steps) == 4


def test_gradients_may_be_zeroed_after_the_boundary_and_steps_skipped() -> None:
    trainer, batches = small_trainer(every=100)
    for position, batch in enumerate(batches):
        trainer.step_boundary(batch)
        trainer.optimizer.zero_grad()
        trainer.model(batch).square().mean().backward()
        if position == 3:  # as a gradient scaler does where a gradient is infinite
            trainer.optimizer.zero_grad()
            continue
        trainer.optimizer.step()
    assert len(trainer.log.steps) == 6


def test_an_optimizer_keeps_no_trainer_alive() -> None:
    trainer, batches = small_trainer()
    optimizer, model, batch = trainer.optimizer, trainer.model, batches[0]
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    model(batch).sum().backward()
    optimizer.step()


# --- folders and resumes ------------------------------------------------------------------------------------------


def test_a_new_run_takes_no_folder_of_another(tmp_path: Path) -> None:
    """Its checkpoints would be removed as older than those that are there, and a resume would take the other run's."""
    trainer, batches = small_trainer()
    trainer.fit(batches, checkpoints=tmp_path)
    trainer.fit(batches, checkpoints=tmp_path)  # goes on
    trainer, batches = small_trainer()
    with pytest.raises(gtflops.InputError, match="holds step-000000012, a checkpoint of another run"):
        trainer.fit(batches, checkpoints=tmp_path)
    assert not trainer.log.steps


def test_a_folder_that_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer, batches = small_trainer()
    with pytest.raises(gtflops.SavedFileError, match="cannot write the checkpoints into"):
        trainer.fit(batches, checkpoints=tmp_path / "file" / "folder")
    assert not trainer.log.steps


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"frozen": (0,)}, {}, "trained 2 tensors that were frozen when this trainer was built, first '0.bias'"),
        ({}, {"accumulate": 2}, "is of a run with accumulate=1, expected the same, not 2"),
        ({"scheduled": True}, {}, "is of a run without a scheduler, expected the same"),
    ],
)
def test_a_resume_that_does_not_fit_changes_nothing(
    options: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer, batches = small_trainer(budget=None)
    trainer.fit(batches[:3], checkpoints=tmp_path)
    scheduled = "scheduled" in options
    trainer, batches = small_trainer(budget=None, frozen=options.get("frozen", ()))
    if scheduled:
        trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    before = copy.deepcopy(trainer.model.state_dict())
    required = [tensor.requires_grad for tensor in trainer.model.parameters()]
    with pytest.raises(gtflops.InputError, match=message):
        trainer.fit(batches, checkpoints=tmp_path, resume=True, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert required == [tensor.requires_grad for tensor in trainer.model.parameters()]


def test_the_second_of_two_fits_is_resumed_with_its_number_of_steps(tmp_path: Path) -> None:
    """A total is spread over all of them."""

    def stop(record: Any) -> None:
        if record.step == 8:
            raise RuntimeError("stopped")

    def run(folder: Path, *, stopped: bool) -> gtflops.GreenTrainer:
        trainer, batches = small_trainer(budget=Total(flops=60_000))
        trainer.fit(batches)
        options: dict[str, Any] = {"checkpoints": folder, "checkpoint_every": 1}
        if not stopped:
            trainer.fit(batches, **options)
            return trainer
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(batches, on_step=stop, **options)
        trainer, _ = small_trainer(budget=Total(flops=60_000))
        trainer.fit(batches, resume=True, **options)
        return trainer

    whole, resumed = run(tmp_path / "whole", stopped=False), run(tmp_path / "stopped", stopped=True)
    assert resumed.num_steps == whole.num_steps == 12
    assert [record.budget for record in resumed.log.selections] == [record.budget for record in whole.log.selections]
    assert len({record.budget for record in whole.log.selections}) > 1
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
