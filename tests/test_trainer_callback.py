"""The callback in transformers' Trainer: what it plans is executed, what it freezes does not move, resume is exact."""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from transformers import BertConfig, T5Config, Trainer, TrainerCallback, TrainingArguments

import gtflops
from gtflops.integrations.transformers import GreenTrainerCallback
from gtflops.training import Budget, EnergyMeter, Progress, Total
from small_models import VOCABULARY, build

SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> Any:
    config = BertConfig(**SMALL, hidden_size=16, intermediate_size=24, num_labels=3, max_position_embeddings=64)
    return transformers.BertForSequenceClassification(config)


def t5() -> Any:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def lora() -> Any:
    return peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    )


MODELS: dict[str, Any] = {
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
    "t5": t5,
    "bert": bert,
    "lora": lora,
}


def rows(lengths: tuple[int, ...] = (11,), *, kind: str = "llama") -> list[dict[str, Any]]:
    """Twelve rows of these lengths by turns, without padding: the collator pads each batch to its longest."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for index in range(12):
        ids = torch.randint(3, VOCABULARY, (lengths[index % len(lengths)],), generator=generator)
        result.append({"input_ids": ids, "labels": int(ids[0]) % 3 if kind == "bert" else ids})
    return result


def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A default collator without a tokenizer."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in batch]
    one_label = not isinstance(batch[0]["labels"], torch.Tensor)
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in batch])
        if one_label
        else pad([row["labels"] for row in batch], batch_first=True, padding_value=-100),
    }


class Counting(Trainer):
    """Counts what each of its real training steps executes, and writes down their losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executed: list[int] = []
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "backward" in vars(self.accelerator):  # gtflops traces, or measures importance
            return super().training_step(*args, **kwargs)
        with gtflops.ExecutedFlops() as executed:
            loss = super().training_step(*args, **kwargs)
        self.executed.append(executed.total)
        self.losses.append(loss.item())
        return loss


def trainer_of(
    model: Any, folder: Path, *callbacks: Any, kind: str = "llama", trainer: Any = Counting, **arguments: Any
) -> Any:
    data = rows(arguments.pop("lengths", (11,)), kind=kind)
    names = ("optimizers", "compute_loss_func", "eval_dataset")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    options = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return trainer(
        model=model,
        args=TrainingArguments(str(folder), **options),
        train_dataset=data,
        data_collator=padded,
        callbacks=list(callbacks),
        **own,
    )


def planned(callback: GreenTrainerCallback) -> list[int]:
    return [step.planned_flops for step in callback.log.steps]


def _trainable(model: Any) -> int:
    return sum(tensor.requires_grad for tensor in model.parameters())


def by_step(executed: list[int], batches: int) -> list[int]:
    return [sum(executed[start : start + batches]) for start in range(0, len(executed), batches)]


# --- what is planned is what the Trainer executes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in MODELS), ("llama", True), ("lora", True)]
)
def test_planned_flops_are_executed(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """Batches of several lengths, two a step, the last of an epoch alone; and the budget holds on the sum."""
    callback = GreenTrainerCallback(budget=0.75, every=2)
    trainer = trainer_of(
        MODELS[kind](),
        tmp_path,
        callback,
        kind=kind,
        gradient_accumulation_steps=4,
        activation_checkpointing=checkpointing,
        lengths=(8, 11) if kind == "t5" or checkpointing else (8, 11, 14, 17),
    )
    trainer.train()
    executed = [sum(trainer.executed[start:end]) for start, end in ((0, 4), (4, 6), (6, 10), (10, 12))]
    assert executed == planned(callback)
    assert len(set(executed)) > 1
    log = callback.log
    assert log.planned_flops <= 0.75 * log.full_flops
    assert [record.step for record in log.selections] == [0, 2]
    assert trainer.state.total_flos == log.planned_flops + log.measuring_flops


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.float().square().mean()},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_loss_and_the_autocast_are_the_trainers(options: dict[str, Any], tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.7, every=3)
    trainer = trainer_of(build("llama"), tmp_path, callback, gradient_accumulation_steps=2, **options)
    trainer.train()
    assert by_step(trainer.executed, 2) == planned(callback)
    own = gtflops.profile(trainer.model, padded(rows()[:2]))
    assert callback._run is not None
    assert callback._run.green is not None
    assert callback._run.green.profile.at(batch_size=2, seq_len=11).full_flops != own.full_flops


@pytest.fixture
def half_precision_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate makes of fp16=True on a GPU. On the CPU it trains in float32, and says nothing."""
    create = Trainer.create_accelerator_and_postprocess

    def created(self: Any) -> None:
        create(self)
        assert (self.accelerator.native_amp, self.accelerator.scaler) == (False, None)
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-14)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", created)


@pytest.mark.usefixtures("half_precision_on_the_cpu")
@pytest.mark.parametrize("clip", [0.1, 0.0])
def test_scaled_gradients(clip: float, tmp_path: Path) -> None:
    """The first step overflows and is left out: its FLOPs are executed, and the estimate is checked in the next one."""
    watch, callback = Watch(), GreenTrainerCallback(budget=0.6, every=2)
    trainer = trainer_of(
        build("llama"), tmp_path, callback, watch, fp16=True, max_steps=4, optim="sgd", max_grad_norm=clip,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert by_step(trainer.executed, 2) == planned(callback)
    assert watch.moved[0] == set()
    assert watch.moved[1:] == watch.trained[1:]
    assert [step.real_drop is not None for step in callback.log.steps] == [False, True, False, False]  # it held
    for step in callback.log.checked:
        assert step.real_drop == pytest.approx(step.predicted_drop, rel=0.1)


def test_autocast_is_that_of_the_step_when_importance_is_measured(tmp_path: Path) -> None:
    def first(**options: Any) -> dict[str, float]:
        torch.manual_seed(0)
        callback = GreenTrainerCallback(budget=0.7)
        trainer_of(build("llama"), tmp_path, callback, max_steps=1, **options).train()
        return dict(callback.log.selections[0].selection.importance)

    plain, halved = first(), first(bf16=True)
    assert plain != halved
    assert all(halved[name] == pytest.approx(value, rel=0.1, abs=1e-3) for name, value in plain.items())


def test_input_gradients_are_off_under_checkpointing_and_back_on_after(tmp_path: Path) -> None:
    """With them, the backward pass goes down to the embedding whatever is frozen."""
    callback = GreenTrainerCallback(budget=0.7, must_train="lm_head.weight", must_freeze="model.*")
    trainer = trainer_of(build("llama"), tmp_path, callback, activation_checkpointing=True, max_steps=2)
    trainer.train()
    assert trainer.executed == planned(callback)
    batch = padded(rows()[:2])
    assert len(trainer.model._require_grads_hooks) == 1
    with_them = gtflops.profile(trainer.model, batch).step_flops(["lm_head.weight"])
    trainer.model.disable_input_require_grads()
    without = gtflops.profile(trainer.model, batch).step_flops(["lm_head.weight"])
    assert without.recompute == 0 < with_them.recompute
    assert max(planned(callback)) < with_them.total


def test_peft_selects_among_adapters(tmp_path: Path) -> None:
    model = lora()
    adapters = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    before = copy.deepcopy(dict(model.named_parameters()))
    callback = GreenTrainerCallback(budget=0.6, every=3)
    trainer_of(model, tmp_path, callback).train()
    selected = set().union(*(record.names for record in callback.log.selections))
    assert selected < adapters
    assert {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])} <= selected
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == adapters


def test_what_brings_most_per_flop_is_trained_for_its_reason(tmp_path: Path) -> None:
    callback = GreenTrainerCallback("auto", every=3)
    trainer = trainer_of(build("llama"), tmp_path, callback, max_steps=4)
    trainer.train()
    assert trainer.executed == planned(callback)
    for record in callback.log.selections:
        assert record.reason is not None
        assert "is predicted to bring" in record.reason
        assert record.budget is None
    assert callback.state()["args"]["budget"] == "auto"
    assert "gtflops/budget" not in trainer.state.log_history[0]


# --- flipping while training ------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes after each optimizer step which tensors moved in it, and which required gradients."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.trained: list[set[str]] = []
        self._before: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        self.trained.append({name for name, tensor in model.named_parameters() if tensor.requires_grad})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = dict(model.named_parameters())
        self.moved.append({name for name, value in self._before.items() if not torch.equal(value, parameters[name])})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_frozen_tensors_do_not_move_by_a_bit(optim: str, tmp_path: Path) -> None:
    """Accumulation, clipping, weight decay, momentum of what was trained before: only what is selected moves."""
    watch, callback = Watch(), GreenTrainerCallback(budget=0.6, every=1)
    trainer = trainer_of(
        build("llama"), tmp_path, callback, watch, optim=optim, gradient_accumulation_steps=3, weight_decay=0.1,
        max_grad_norm=0.1, lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer.train()
    assert len(watch.moved) == 4
    assert all(moved <= trained for moved, trained in zip(watch.moved, watch.trained, strict=True))
    assert sum(map(len, watch.moved)) > 0.9 * sum(map(len, watch.trained))
    assert by_step(trainer.executed, 3) == planned(callback)


def test_a_warm_up_from_zero_has_importances(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = GreenTrainerCallback(budget=0.6, every="epoch")
    trainer = trainer_of(build("llama"), tmp_path, callback, warmup_steps=4, lr_scheduler_type="cosine")
    trainer.train()
    assert callback.log.steps[0].learning_rate == 0
    assert [record.step for record in callback.log.selections] == [0, 6]
    torch.manual_seed(0)
    at_once = GreenTrainerCallback(budget=0.6)  # at the rate of the warm-up's second step, whatever it goes up to
    trainer_of(build("llama"), tmp_path, at_once, learning_rate=1e-2 / 4, max_steps=1).train()
    assert callback.log.selections[0].selection.importance == at_once.log.selections[0].selection.importance


@pytest.mark.parametrize("kind", ["gpt2", "lora"])
def test_a_budget_of_one_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Dropout, shuffling: tracing, measuring and selecting leave the random states and the run as they are."""

    def losses(*callbacks: Any) -> list[float]:
        torch.manual_seed(0)
        trainer = trainer_of(MODELS[kind](), tmp_path, *callbacks, gradient_accumulation_steps=2, optim="sgd")
        trainer.train()
        return trainer.losses

    callback = GreenTrainerCallback(budget=1.0, every=1)
    assert losses(callback) == losses()
    assert len(callback.log.selections) == 6
    assert max(len(record.names) for record in callback.log.selections) == _trainable(MODELS[kind]())


def test_measuring_in_the_middle_of_an_accumulation(tmp_path: Path) -> None:
    """There, accelerate's wrapper makes no step of the optimizer, and two passes need one."""
    moved: list[bool] = []

    class Steps(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
        ) -> None:
            for step in (optimizer.step, optimizer.optimizer.step):
                before = model.lm_head.weight.detach().clone()
                model.lm_head.weight.grad = torch.ones_like(before)
                step()
                moved.append(not torch.equal(model.lm_head.weight, before))
                model.lm_head.weight.grad = None

    trainer_of(build("llama"), tmp_path, Steps(), gradient_accumulation_steps=2, max_steps=1).train()
    assert moved == [False, True]
    by_two_passes = partial(gtflops.measure_importance, method="two-pass")
    callback = GreenTrainerCallback(budget=0.6, measure=by_two_passes)
    trainer_of(build("llama"), tmp_path, callback, gradient_accumulation_steps=2, max_steps=1).train()
    assert all(value > 0 for value in callback.log.selections[0].selection.importance.values())


def test_when_it_selects(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.6, every=lambda step: step in (1, 4))
    trainer_of(build("llama"), tmp_path, callback, max_steps=5).train()
    assert [record.step for record in callback.log.selections] == [0, 1, 4]


def test_every_candidate_requires_gradients_again(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.5)
    trainer = trainer_of(build("llama"), tmp_path, callback, max_steps=2)
    trainer.train()
    assert all(tensor.requires_grad for tensor in trainer.model.parameters())
    for name in ("get_batch_samples", "log", "floating_point_ops"):
        assert name not in vars(trainer)
    trainer.train()
    assert len(callback.log.steps) == 2


def test_an_evaluation_in_between_is_no_other_step(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.6, every=1)
    trainer = trainer_of(
        build("gpt2"), tmp_path, callback, eval_strategy="steps", eval_steps=1, max_steps=3, eval_dataset=rows()
    )
    trainer.train()
    assert trainer.executed == planned(callback)
    assert callback._run is not None
    assert len(callback._run.green._prices._known) == 1  # type: ignore[union-attr]  # a trace in each mode otherwise


# --- how it selects, and whether that holds -----------------------------------------------------------------------


def test_another_measure(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def by_size(model: Any, batches: Any, optimizer: Any, loss: Any, **options: Any) -> dict[str, float]:
        asked.append(options)
        return {name: float(tensor.numel()) for name, tensor in model.named_parameters()}

    callback = GreenTrainerCallback(budget=0.7, every=2, measure=by_size)
    trainer = trainer_of(build("llama"), tmp_path, callback, max_steps=3)
    trainer.train()
    assert asked == [{"scheduler": trainer.lr_scheduler}] * 2
    assert all(
        value == trainer.model.get_parameter(name).numel()
        for name, value in callback.log.selections[0].selection.importance.items()
    )


def test_a_scheme_of_its_own(tmp_path: Path) -> None:
    def by_turns(profile: gtflops.Profile, step: int) -> list[str]:
        return [name for name in profile.names if f"layers.{step % 3}." in name]

    watch, callback = Watch(), GreenTrainerCallback(every=1, choose=by_turns)
    trainer = trainer_of(build("llama"), tmp_path, callback, watch, max_steps=3)
    trainer.train()
    for step, trained in enumerate(watch.trained):
        assert trained == {name for name, _ in trainer.model.named_parameters() if f"layers.{step}." in name}
    assert trainer.executed == planned(callback)
    assert not callback.log.checked


def test_the_estimate_is_checked_in_the_step_after_a_selection(tmp_path: Path) -> None:
    """With dropout, two batches a step of different lengths, and gradients clipped to a fraction."""
    callback = GreenTrainerCallback(budget=0.7, every=2)
    trainer = trainer_of(
        build("gpt2"), tmp_path, callback, optim="sgd", gradient_accumulation_steps=2, max_grad_norm=0.1,
        max_steps=3, lengths=(8, 8, 14, 14),
    )  # fmt: skip
    trainer.train()
    assert [step.real_drop is not None for step in callback.log.steps] == [True, False, False]  # it held
    for step in callback.log.checked:
        assert step.real_drop == pytest.approx(step.predicted_drop, rel=0.1)
    assert trainer.state.total_flos == callback.log.planned_flops + callback.log.measuring_flops


def test_an_estimate_that_does_not_hold_is_warned_of(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.7)
    trainer = trainer_of(build("llama"), tmp_path, callback, learning_rate=0.5, max_steps=1)
    with pytest.warns(UserWarning, match=r"step 0: predicted drop .* the first-order estimate does not hold"):
        trainer.train()


def test_energy_is_measured_and_may_be_the_budget(tmp_path: Path) -> None:
    def run(total: float, **options: Any) -> Any:
        callback = GreenTrainerCallback(Total(kwh=total), every=100, energy=meter)
        trainer = trainer_of(build("llama"), tmp_path, callback, max_steps=2, **options)
        trainer.train()
        assert callback.log.energy.co2_kg == pytest.approx(0.3 * callback.log.energy.kwh)
        return trainer, callback.log

    meter = EnergyMeter(intensity=300.0, tracking="process")
    trainer, log = run(1.0, save_strategy="steps", save_steps=1)
    last = trainer.state.log_history[-1]
    assert 0 < last["gtflops/kwh"] <= log.energy.kwh < 1e-3
    assert last["gtflops/co2_kg"] == pytest.approx(0.3 * last["gtflops/kwh"])
    assert 0 < log.steps[0].kwh <= log.steps[1].kwh <= log.energy.kwh
    assert log.steps[1].co2_kg == pytest.approx(0.3 * log.steps[1].kwh)
    used = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["stateful_callbacks"]
    kwh = used["GreenTrainerCallback"]["attributes"]["progress"]["energy"]["kwh"]
    again = trainer_of(build("llama"), tmp_path, callback := GreenTrainerCallback(Total(kwh=1.0), energy=meter))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert callback.log.energy is not None
    assert kwh < callback.log.energy.kwh < kwh + 1e-3
    _, log = run(1e-12)
    assert not log.steps
    assert log.energy.kwh < kwh, "the run before counts too"
    assert "Total(kwh=1e-12) is spent" in log.stopped


# --- what is logged ---------------------------------------------------------------------------------------------


def test_logs(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.6, every=4)
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(build("llama"), tmp_path, Reporter(), callback, save_strategy="steps", save_steps=4)
    trainer.train()
    log, total = callback.log, callback.log.planned_flops + callback.log.measuring_flops
    assert [entry["gtflops/step_flops"] for entry in seen[:-1]] == planned(callback) == trainer.executed
    last = seen[-1]
    assert last["gtflops/flops_total"] == last["total_flos"] == trainer.state.total_flos == total
    assert last["gtflops/flops_saved"] == log.full_flops - total
    assert last["gtflops/selected_tensors"] == len(log.selections[-1].names)
    assert last["gtflops/budget"] == 0.6
    assert last["gtflops/importance_captured"] == log.selections[-1].importance_captured
    assert trainer.state.log_history[-1].items() >= last.items()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert callback._run is not None
    assert callback._run.green is not None
    measured = log.selections[0].full_flops + callback._run.green.profile.forward_flops  # and the check of it
    assert state["total_flos"] == sum(planned(callback)[:4]) + measured
    assert log.checked == (log.steps[0],)  # it held
    assert seen[0]["gtflops/predicted_drop"] == seen[3]["gtflops/predicted_drop"] == log.steps[0].predicted_drop
    assert last["gtflops/real_drop"] == log.steps[0].real_drop


# --- resume -----------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self._step


@pytest.mark.parametrize(("stop", "restored"), [(2, False), (3, False), (4, True)])
def test_a_resumed_run_is_the_run_without_the_stop(stop: int, restored: bool, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, at its end, and after a selection in the next: weights equal to the bit."""

    def run(folder: Path, *callbacks: Any, resume: bool = False) -> tuple[Any, Any]:
        torch.manual_seed(0)
        callback = GreenTrainerCallback(budget=0.6, every="epoch")
        trainer = trainer_of(
            build("gpt2"), folder, callback, *callbacks, gradient_accumulation_steps=2, save_strategy="steps",
            save_steps=1, warmup_steps=2, restore_callback_states_from_checkpoint=restored,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        callbacks = [own for own in trainer.callback_handler.callbacks if isinstance(own, GreenTrainerCallback)]
        return trainer, callbacks[0].log

    whole, whole_log = run(tmp_path / "whole")
    run(tmp_path / "stopped", StopAt(stop))
    resumed, resumed_log = run(tmp_path / "stopped", resume=True)
    assert resumed.losses == whole.losses[2 * stop :]
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    assert [record.names for record in resumed_log.selections] == [record.names for record in whole_log.selections]
    assert resumed_log.steps == whole_log.steps
    assert resumed.state.total_flos == whole.state.total_flos
    assert resumed.state.log_history[-1]["gtflops/flops_saved"] == whole.state.log_history[-1]["gtflops/flops_saved"]


def test_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    trainer_of(build("llama"), tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = trainer_of(build("llama"), tmp_path, GreenTrainerCallback())
    with pytest.raises(gtflops.InputError, match="checkpoint of step 1 was saved without GreenTrainerCallback"):
        trainer.train(resume_from_checkpoint=True)


# --- wrong set-ups ----------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Iterator[Any]:
    """A model that no failed set-up may change."""
    built = build("llama")
    before = copy.deepcopy(built.state_dict())
    yield built
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_frozen_before_the_trainer_is_built(model: Any, tmp_path: Path) -> None:
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(
        gtflops.InputError, match=r"'model\.embed_tokens\.weight', .* call model\.requires_grad_\(True\)"
    ):
        trainer_of(model, tmp_path, GreenTrainerCallback()).train()


def test_frozen_on_purpose(tmp_path: Path) -> None:
    frozen = build("llama")
    frozen.model.embed_tokens.requires_grad_(False)
    callback = GreenTrainerCallback(budget=0.8, must_freeze="*embed_tokens*")
    trainer = trainer_of(frozen, tmp_path, callback, max_steps=2)
    trainer.train()
    assert trainer.executed == planned(callback)
    assert not frozen.model.embed_tokens.weight.requires_grad


def test_reentrant_checkpoints(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(
        model, tmp_path, GreenTrainerCallback(),
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(gtflops.InputError, match=r'TrainingArguments\(.*"use_reentrant": False'):
        trainer.train()


def test_another_callback_that_flips(tmp_path: Path) -> None:
    class Freezes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.lm_head.requires_grad_(not model.lm_head.weight.requires_grad)

    trainer = trainer_of(build("llama"), tmp_path, GreenTrainerCallback(0.6), Freezes())
    with pytest.raises(gtflops.InputError, match=r"'lm_head\.weight' was (thawed|frozen) by something else"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_optimizer_that_does_not_hold_all(model: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    trainer = trainer_of(model, tmp_path, GreenTrainerCallback(), optimizers=(optimizer, None))
    with pytest.raises(gtflops.InputError, match=r"the optimizer does not hold 29 of 30 tensors"):
        trainer.train()


def test_added_twice(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, GreenTrainerCallback(), GreenTrainerCallback(0.7))
    with pytest.raises(gtflops.InputError, match="more than one GreenTrainerCallback"):
        trainer.train()


def test_no_loss(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, GreenTrainerCallback())
    trainer.data_collator = lambda batch: {name: value for name, value in padded(batch).items() if name != "labels"}
    with pytest.raises(gtflops.InputError, match="model did not return a loss from the inputs"):
        trainer.train()


def test_an_infeasible_budget_trains_nothing(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, GreenTrainerCallback(0.2))
    with pytest.raises(gtflops.InfeasibleBudgetError, match="smallest feasible budget"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_total_that_is_spent_ends_the_training(tmp_path: Path) -> None:
    """It pays for fewer steps than there are, once measuring is paid."""
    model = build("llama")
    full = gtflops.profile(model, padded(rows()[:2])).full_flops
    callback = GreenTrainerCallback(Total(flops=int(8 * full)), every=100)
    trainer = trainer_of(model, tmp_path, callback, lengths=(11, 40))
    trainer.train()
    assert 0 < trainer.state.global_step < 12
    assert trainer.state.global_step == len(callback.log.steps) == len(trainer.losses)
    assert callback.log.stopped is not None
    spent = callback.log.planned_flops + callback.log.measuring_flops
    assert trainer.state.total_flos == spent <= 8 * full


def test_what_was_measured_for_a_step_that_is_not_made_counts(tmp_path: Path) -> None:
    class EndsAfterMeasuring(Budget):
        def share(self, progress: Progress) -> float:
            return 0.6

        def exhausted(self, progress: Progress, next_flops: int) -> str | None:
            return "enough" if progress.step == 3 and next_flops < 0.95 * progress.full_flops else None

    callback = GreenTrainerCallback(EndsAfterMeasuring(), every=3)
    trainer = trainer_of(build("llama"), tmp_path, callback)
    trainer.train()
    assert callback.log.stopped == "enough"
    assert [record.step for record in callback.log.selections] == [0, 3]
    assert trainer.state.total_flos == callback.log.planned_flops + callback.log.measuring_flops


def test_a_resumed_run_whose_total_is_spent_ends_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    total = Total(flops=int(7 * gtflops.profile(model, padded(rows()[:2])).full_flops))
    options = {"lengths": (11, 40), "save_strategy": "steps", "save_steps": 1}
    first = GreenTrainerCallback(total, every=100)
    trainer_of(model, tmp_path, first, **options).train()
    assert first.log.stopped is not None
    assert 0 < len(first.log.steps) < 12
    again = GreenTrainerCallback(total, every=100)
    trainer = trainer_of(model := build("llama"), tmp_path, again, **options)
    caplog.clear()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.losses == []
    assert again.log.stopped == first.log.stopped
    assert again.log.steps == first.log.steps
    assert trainer.state.total_flos == first.log.planned_flops + first.log.measuring_flops
    assert all(tensor.requires_grad for tensor in model.parameters())
    (message,) = (record.getMessage() for record in caplog.records if record.name.startswith("gtflops"))
    assert message == f"training ends after {len(first.log.steps)} steps: {first.log.stopped}"


def test_every_is_checked_where_it_is_given() -> None:
    with pytest.raises(gtflops.InputError, match="every is 'step'"):
        GreenTrainerCallback(every="step")  # type: ignore[arg-type]


class Fails(TrainerCallback):
    """Raises what it was given at one event of the second step, once."""

    def __init__(self, event: str, error: BaseException) -> None:
        self._errors = [error]
        setattr(self, event, self._fail)

    def _fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self._errors:
            raise self._errors.pop()


@pytest.mark.parametrize("where", ["batch", "on_step_begin", "on_pre_optimizer_step", "interrupted", "on_epoch_end"])
def test_a_run_that_failed_is_cleared_away(where: str, tmp_path: Path) -> None:
    """The model is as it was given, and the next run, whose optimizer is built on it, can select all again."""
    error: BaseException = KeyboardInterrupt() if where == "interrupted" else RuntimeError("failed")
    event = "on_optimizer_step" if where == "interrupted" else where
    callback = GreenTrainerCallback(0.6, every=1)
    fails = Fails(event, error)
    # No step of the first epoch but the last may fail at the end of one.
    trainer = trainer_of(
        build("llama"), tmp_path, callback, fails, max_steps=3, activation_checkpointing=True,
        gradient_accumulation_steps=6 if where == "on_epoch_end" else 1,
    )  # fmt: skip
    methods = set(vars(trainer))
    collator = trainer.data_collator
    if where == "batch":
        batches = iter([collator(rows()[:2]), {"input_ids": torch.ones(2, 3)}])
        trainer.data_collator = lambda _: next(batches)
    with pytest.raises(type(error) if where != "batch" else Exception):
        trainer.train()
    assert 0 < sum(len(record.names) for record in callback.log.selections) < 2 * _trainable(trainer.model)
    assert all(tensor.requires_grad for tensor in trainer.model.parameters())
    assert len(trainer.model._require_grads_hooks) == 1
    assert not {"training_step", "get_batch_samples", "log", "_run_epoch"} & (set(vars(trainer)) - methods)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    trainer.data_collator = collator
    trainer.executed.clear()
    trainer.train()
    assert sum(trainer.executed) == sum(planned(callback))
    assert all(tensor.requires_grad for tensor in trainer.model.parameters())


# --- TRL --------------------------------------------------------------------------------------------------------


def sft(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    """TRL's trainer on texts, with a loss and metrics of its own."""
    vocabulary = {f"w{index}": index for index in range(VOCABULARY - 2)}
    words = tokenizers.models.WordLevel(
        {**vocabulary, "<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}, unk_token="w0"
    )
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{(7 * row + word) % 90}" for word in range(8 + row % 3)) for row in range(12)]

    class CountingSFT(Counting, trl.SFTTrainer):
        pass

    return CountingSFT(
        model=build("gpt2"),
        args=trl.SFTConfig(
            str(folder), per_device_train_batch_size=2, max_steps=6, report_to=[], logging_steps=1, use_cpu=True,
            bf16=False, save_strategy="no", disable_tqdm=True, max_length=32, **arguments,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
        ),
        callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sft_trainer(checkpointing: bool, tmp_path: Path) -> None:
    callback = GreenTrainerCallback(budget=0.9, every=3, must_train="*wte*")
    trainer = sft(tmp_path, callback, gradient_checkpointing=checkpointing)
    trainer.train()
    assert trainer.executed == planned(callback)
    assert len(set(trainer.executed)) > 1


def test_sft_with_a_frozen_head(tmp_path: Path) -> None:
    """TRL's fused head, whose backward takes gradients of head and input together, leaves the head's out."""
    callback = GreenTrainerCallback(budget=0.7, must_freeze="*wte*")
    trainer = sft(tmp_path, callback, gradient_checkpointing=False)
    trainer.train()
    assert trainer.executed == planned(callback)
    assert not any("ChunkedLogProbFunction" in note for note in callback._run.green.profile.notes)  # type: ignore[union-attr]


def test_metrics_of_the_trainer_are_those_of_its_steps(tmp_path: Path) -> None:
    """Tracing and measuring run its code too, and leave nothing in its counters."""

    def history(*callbacks: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)
        trainer = sft(tmp_path, *callbacks, gradient_checkpointing=False, optim="sgd")
        trainer.train()
        return [
            {name: value for name, value in entry.items() if not name.startswith("gtflops/")}
            for entry in trainer.state.log_history[:-1]
        ]

    with_callback, without = history(GreenTrainerCallback(budget=1.0, every=2)), history()
    assert with_callback == without
    assert {"entropy", "num_tokens", "mean_token_accuracy"} <= without[0].keys()


def test_a_condition_of_the_trainer_on_its_data(tmp_path: Path) -> None:
    """It is taken to hold where there is no data; where the importances' batches say that it does not, that is said."""

    class Branching(Counting):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if loss > self.threshold:
                loss = loss * 2
            return loss

    for threshold in (-1.0, 1e9):
        callback = GreenTrainerCallback(budget=0.7)
        trainer = trainer_of(build("llama"), tmp_path, callback, trainer=Branching, max_steps=2)
        trainer.threshold = threshold
        if threshold < 0:
            trainer.train()
            assert trainer.executed == planned(callback)
        else:
            with pytest.raises(gtflops.InputError, match=r"condition of Branching at .*depends on the data"):
                trainer.train()
