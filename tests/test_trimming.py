"""Trimmed batches: the loss and the gradients of the whole ones, for exactly the FLOPs that are planned.

In evaluation mode where two passes are compared: with dropout, random numbers fall on other positions.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import gtflops
import zoo
from gtflops import GreenTrainer, InputError
from gtflops.capture import ExecutedFlops
from gtflops.capture.batches import TARGET_POSITIONS
from gtflops.capture.resizing import layout_of
from gtflops.families import FAMILIES, positions_read
from gtflops.integrations.transformers import GreenTrainerCallback
from gtflops.recipes.batches import EpochBatches
from gtflops.recipes.datasets import DataSet, Example
from gtflops.recipes.finetune import FineTuneSettings, finetune
from gtflops.reuse import ActivationStore, Prefix
from gtflops.reuse.examples import examples_of
from gtflops.shapes import Sizes
from gtflops.training.pricing import Prices
from gtflops.trimming import ByLength, Trim, by_length
from small_models import VOCABULARY, build
from small_tokenizer import WORDS, word_tokenizer

Batch = dict[str, torch.Tensor]

DECODERS = (
    "llama mistral qwen2 qwen3 gemma2 gemma3 gpt-neox falcon phi mixtral-batched opt bloom gpt2".split()  # noqa: SIM905
)
SEQ2SEQ, MASKED = ["t5", "bart"], ["bert", "roberta", "albert"]
#: Positions are counted from the mask, or only their distances matter.
RELATIVE = [*DECODERS[:-1], "t5"]


def model_of(family: str, attention: str = "eager") -> Any:
    return zoo.ZOO[f"{family}-{attention}"]().model


def batch_of(family: str, lengths: list[int], *, left: bool = False, seq_len: int = 14, prompt: int = 2) -> Batch:
    """Rows of tokens of these lengths, with padding behind or in front; labels on all but the first ``prompt``."""
    input_ids = torch.randint(3, VOCABULARY, (len(lengths), seq_len))
    columns = torch.arange(seq_len).expand(len(lengths), -1)
    count = torch.tensor(lengths)[:, None]
    mask = (columns >= seq_len - count) if left else (columns < count)
    input_ids[~mask] = 1 if family in ("roberta", "bart") else 0
    of_target = mask & (columns >= prompt + (seq_len - count if left else 0))
    labels = input_ids.masked_fill(~of_target, -100)
    if family in SEQ2SEQ:
        labels = torch.randint(3, VOCABULARY, (len(lengths), 8))
        labels[:, 6:] = labels[0, 3:] = -100
    if family in MASKED:
        labels = torch.where((columns % 3 == 0) & mask, input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


class InDouble(TorchFunctionMode):
    """What models do in single precision whatever their weights are in, their losses above all, is done in double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def double(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(double, args), **{name: double(value) for name, value in (kwargs or {}).items()})


def loss_and_gradients(model: Any, batch: Batch, **more: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def assert_same(model: Any, batch: Batch, trimmed: Batch, **more: Any) -> None:
    """In double precision, to rounding, gradients that are there at all included."""
    model = model.double().eval()
    with InDouble():
        loss, gradients = loss_and_gradients(model, batch, **more)
        other_loss, others = loss_and_gradients(model, trimmed, **more)
    torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=0)
    assert gradients.keys() == others.keys()
    most = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 1e-10 * most, name


def hooks_of(model: torch.nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Nothing is left as it is without a test that expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="trim:")
        yield


# --- the same loss and gradients ----------------------------------------------------------------------------------


CASES = [
    (family, attention)
    for family, attention in product([*DECODERS, *SEQ2SEQ, *MASKED], ["eager", "sdpa"])
    if f"{family}-{attention}" in zoo.ZOO
]


@pytest.mark.parametrize(("family", "attention"), CASES)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_losses_and_gradients_are_those_of_the_whole_batch(family: str, attention: str, left: bool) -> None:
    model = model_of(family, attention)
    batch = batch_of(family, [9, 5, 11], left=left)
    with Trim(model) as trim:
        trimmed = trim(batch)
        # Where positions are learned and counted by columns, those in front stay.
        expected = 11 if not left or family in RELATIVE else 14
        assert trimmed["input_ids"].shape == trimmed["attention_mask"].shape == (3, expected)
        labelled = batch["labels"][:, 1:] if family in DECODERS else batch["labels"]
        assert trimmed["labels"].shape == (1, int((labelled != -100).sum()))
        if family in SEQ2SEQ:
            assert trimmed["decoder_input_ids"].shape == (3, 6)
        assert_same(model, batch, trimmed)
        count = torch.tensor(40)
        assert_same(model, batch, trimmed, **({} if family in SEQ2SEQ + MASKED else {"num_items_in_batch": count}))
    assert not hooks_of(model)


def test_the_families_are_those_that_are_tested() -> None:
    built = {type(model_of(family)).__name__ for family in [*DECODERS, *SEQ2SEQ, *MASKED]}
    assert built == set(FAMILIES)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_columns_in_front_go_where_positions_are_given(family: str) -> None:
    model, batch = model_of(family), batch_of(family, [9, 5, 11], left=True)
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["position_ids"].shape == (3, 11)
        assert_same(model, batch, trimmed)


def test_inputs_of_a_decoder_that_are_given_are_kept() -> None:
    model, batch = model_of("t5"), batch_of("t5", [9, 5, 11])
    batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 8))
    batch["decoder_attention_mask"] = (torch.arange(8) < torch.tensor([3, 8, 7])[:, None]).long()
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["decoder_attention_mask"].shape == trimmed["decoder_input_ids"].shape == (3, 6)
        assert_same(model, batch, trimmed)


def test_embeddings_in_the_place_of_tokens() -> None:
    model, batch = model_of("llama"), batch_of("llama", [9, 5, 11])
    batch["inputs_embeds"] = torch.randn(3, 14, 32, dtype=torch.float64)
    del batch["input_ids"]
    with Trim(model) as trim:
        assert trim(batch)["inputs_embeds"].shape == (3, 11, 32)
        assert_same(model, batch, trim(batch))


def test_a_row_without_labels_and_a_batch_without_any() -> None:
    model, batch = model_of("llama").double().eval(), batch_of("llama", [9, 5, 11])
    batch["labels"][1] = -100
    with Trim(model) as trim:
        assert_same(model, batch, trim(batch))
        batch["labels"][:] = -100
        trimmed = trim(batch)
        assert trimmed["labels"].tolist() == [[-100]]
        assert model(**batch).loss.isnan()
        assert model(**trimmed).loss.isnan()
        assert model(**trimmed, num_items_in_batch=torch.tensor(7)).loss == 0


def test_padding_with_a_label_stays() -> None:
    model, batch = model_of("llama"), batch_of("llama", [9, 5, 11])
    batch["labels"][2, 11] = 7
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["input_ids"].shape == (3, 12)
        assert_same(model, batch, trimmed)


def test_without_a_mask_and_without_padding() -> None:
    model, batch = model_of("llama"), batch_of("llama", [14, 14, 14], prompt=0)
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["input_ids"].shape == (3, 14)
        assert trimmed["labels"].shape == (1, 3 * 13)
        assert_same(model, batch, trimmed)
        del batch["attention_mask"]
        trimmed = trim(batch)
        assert trimmed.keys() == {"input_ids", "labels", "shift_labels", TARGET_POSITIONS}
        assert_same(model, batch, trimmed)


def test_a_batch_of_which_all_is_needed_is_as_it_was() -> None:
    model = model_of("t5")
    batch = batch_of("t5", [14, 14])
    batch["labels"] = torch.randint(3, VOCABULARY, (2, 8))
    trimmed = Trim(model)(batch)
    assert trimmed.keys() == batch.keys()
    assert all(trimmed[name] is batch[name] for name in batch)


def test_the_logits_are_those_of_the_labels() -> None:
    model, batch = model_of("gemma3").double().eval(), batch_of("gemma3", [9, 5, 11])
    with Trim(model) as trim, torch.no_grad(), InDouble():
        trimmed = trim(batch)
        all_logits, logits = model(**batch).logits, model(**trimmed).logits
    chosen = all_logits[:, :11].flatten(0, 1)[trimmed[TARGET_POSITIONS]]
    torch.testing.assert_close(logits, chosen[None])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_with_prefix_tuning(left: bool) -> None:
    """Keys and values stand before those of the batch, which is as long as it was."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config).double()
    batch = batch_of("llama", [9, 5, 11], left=left)
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["input_ids"].shape == (3, 14 if left else 11), "how far a prefix is away matters"
        assert_same(model, batch, trimmed)


def test_with_adapters() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(build("llama"), config)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor)
    batch = batch_of("llama", [9, 5, 11])
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert trimmed["labels"].shape[1] == 9 + 5 + 11 - 6
        assert_same(model, batch, trimmed)


def test_router_losses_do_not_see_padding() -> None:
    model, batch = model_of("mixtral-batched"), batch_of("mixtral", [9, 5, 11])
    with Trim(model) as trim:
        assert_same(model, batch, trim(batch), output_router_logits=True)


# --- the model and the batches are left as they were --------------------------------------------------------------


def test_a_batch_is_not_changed_and_a_trimmed_one_is_itself() -> None:
    model, batch = model_of("llama"), batch_of("llama", [9, 5, 11])
    before = {name: tensor.clone() for name, tensor in batch.items()}
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], before[name]) for name in batch)
        assert trim(trimmed) is trimmed


def test_other_batches_run_as_before() -> None:
    model, batch = model_of("llama").eval(), batch_of("llama", [9, 5, 11])
    expected = model(**batch).logits
    with Trim(model) as trim:
        trimmed = trim(batch)
        assert torch.equal(model(**batch).logits, expected)
        with pytest.raises(ValueError, match="specify exactly one"):
            model(**{**trimmed, "input_ids": None})
        assert torch.equal(model(**batch).logits, expected)


def test_hooks_end_with_the_object_and_after_errors() -> None:
    model, batch = model_of("llama"), batch_of("llama", [9, 5, 11])
    trim = Trim(model)
    assert not hooks_of(model)
    trim(batch)
    assert hooks_of(model)
    del trim
    assert not hooks_of(model)
    with pytest.raises(IndexError), Trim(model) as trim:
        model(**trim(batch | {"input_ids": batch["input_ids"] + VOCABULARY}))
    assert not hooks_of(model)


def test_a_copy_of_a_model_with_hooks_is_on_its_own() -> None:
    model, batch = model_of("llama").eval(), batch_of("llama", [9, 5, 11])
    with Trim(model) as trim:
        trimmed = trim(batch)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**trimmed).loss, model(**trimmed).loss)
    assert copied(**trimmed).logits.shape == (1, 19, VOCABULARY)


def test_a_head_that_is_not_called_is_an_error() -> None:
    model, batch = model_of("llama"), batch_of("llama", [9, 5, 11])
    with Trim(model) as trim:
        trimmed = trim(batch)
        head, model.lm_head = model.lm_head, torch.nn.Linear(32, VOCABULARY)
        with pytest.raises(InputError, match="did not call its head"):
            model(**{**trimmed, "labels": None})
        model.lm_head = head
        assert model(**trimmed).loss.isfinite()


# --- what is left as it is, and says so ---------------------------------------------------------------------------


class OwnForward(hf.LlamaForCausalLM):
    """A forward pass that may do anything."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


OwnForward.__name__ = "LlamaForCausalLM"


def with_own_loss() -> Any:
    model = build("llama")
    model.loss_function = lambda *args, **kwargs: torch.tensor(0.0)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Trim(model_of("mamba")), "MambaForCausalLM is none of the models"),
        (lambda: Trim(build("llama"), lambda outputs, batch: outputs.logits.sum()), "loss is one of your own"),
        (lambda: Trim(OwnForward(build("llama").config)), "forward pass .* is not that of transformers"),
        (lambda: Trim(with_own_loss()), "loss_function of LlamaForCausalLM is not that"),
        (lambda: Trim(zoo.ZOO["peft-prompt"]().model), "virtual tokens"),
    ],
)
def test_models_that_are_left_as_they_are(make: Callable[[], Trim], why: str) -> None:
    batch = batch_of("llama", [9, 5, 11])
    with pytest.warns(UserWarning, match=f"trim: .*{why}"):
        trim = make()
    assert trim(batch) is batch


def test_mixed_precision_around_the_forward_pass_is_seen_through() -> None:
    """What accelerate does to the model of a Trainer with bf16, which is what most are trained with."""
    batch, plain = batch_of("llama", [9, 5, 11]), build("llama")
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before this one, and for those after it
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(plain))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" in vars(model)
    with warnings.catch_warnings(action="error"), Trim(model) as trim:
        trimmed = trim(batch)
        assert TARGET_POSITIONS in trimmed
        torch.testing.assert_close(model(**trimmed).loss, model(**batch).loss, rtol=1e-2, atol=0)

    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings(action="error"):
        forward = torch.autocast("cpu", dtype=torch.bfloat16)(type(plain).forward)
        monkeypatch.setattr(type(plain), "forward", forward)
        with Trim(plain) as trim:
            assert TARGET_POSITIONS in trim(batch)

    wrapped = copy.deepcopy(plain)
    wrapped.forward = functools.wraps(wrapped.forward)(lambda **inputs: plain(**inputs))
    with pytest.warns(UserWarning, match=r"forward pass .* is not that of transformers"):
        assert Trim(wrapped)(batch) is batch


def test_lengths_that_a_model_looks_at_are_left() -> None:
    config = hf.LlamaConfig(
        **zoo.GROUPED, max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    )
    model, batch = hf.LlamaForCausalLM(config), batch_of("llama", [9, 5, 11])
    with pytest.warns(UserWarning, match="'dynamic'.*padding is left in"):
        trim = Trim(model)
    with trim:
        trimmed = trim(batch)
        assert trimmed["input_ids"].shape == (3, 14)
        assert_same(model, batch, trimmed)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"patches": torch.ones(3, 14)}, "columns of 'patches'"),
        ({"attention_mask": torch.ones(3, 1, 14, 14)}, "is not that of all tokens"),
        ({"shift_labels": torch.ones(3, 14, dtype=torch.int64)}, "columns of 'shift_labels'"),
        ({"labels": torch.ones(3, 5, dtype=torch.int64)}, "is not that of all tokens"),
    ],
)
def test_batches_that_are_left_as_they_are(more: Batch, why: str) -> None:
    batch = batch_of("llama", [9, 5, 11]) | more
    trim = Trim(build("llama"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert trim(batch)["input_ids"].shape == (3, 14)
        assert trim((batch,)) == (batch,)
    messages = [str(warning.message) for warning in said]
    assert sum(why in message for message in messages) == 1  # it is said once
    assert "a batch is a tuple" in messages[-1]


def test_what_trim_may_be() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="trim is 'always', expected 'auto'"):
        GreenTrainer(model, torch.optim.SGD(model.parameters()), batch_of("llama", [9, 5]), trim="always")


# --- what it costs ------------------------------------------------------------------------------------------------


SLOWER = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "bart")]


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2", "mixtral-batched", "t5", "bert", *SLOWER])
def test_prices_are_exact_for_any_number_of_labels(family: str) -> None:
    """Against what runs, operator by operator."""
    model = model_of(family).train()
    all_lengths = ([9, 5, 11], [14, 3, 8], [4, 4, 7], [13, 12, 11])[: 2 if family in SEQ2SEQ else None]
    with Trim(model) as trim:
        prices, seen = Prices(model, None), set()
        for lengths, prompt in product(all_lengths, (1, 2, 3)):
            batch = batch_of(family, lengths, prompt=prompt)
            if family in MASKED:
                batch["labels"][:, prompt] = -100
            if family in SEQ2SEQ:
                batch["labels"][1, 3 + prompt :] = -100
            trimmed = trim(batch)
            seen.add((trimmed["input_ids"].shape, trimmed["labels"].shape))
            model.zero_grad(set_to_none=True)
            with ExecutedFlops() as executed:
                model(**trimmed).loss.backward()
            assert prices.of(trimmed).full_flops == executed.total, (lengths, prompt)
    assert len(seen) > 4


def test_a_number_of_labels_needs_no_trace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    traced: list[int] = []
    with Trim(model) as trim:
        profile = gtflops.profile(model, trim(batch_of("llama", [9, 5, 13])))
        source = profile._shapes.source
        original = type(source).trace
        monkeypatch.setattr(type(source), "trace", lambda self, sizes: (traced.append(1), original(self, sizes))[1])
        for num_targets in (2, 300, 299, 17, 64, 128, 11):
            profile.at(num_targets=num_targets)
        assert len(traced) <= 4
        prices = Prices(model, None)
        prices.of(trim(batch_of("llama", [9, 5, 13])))
        traced.clear()
        for first, second, prompt in product(range(6, 14), range(3, 6), (1, 2)):
            prices.of(trim(batch_of("llama", [first, second, 4], prompt=prompt)))
        assert len(traced) <= 16  # of 48 batches


def test_the_layout_of_a_trimmed_batch() -> None:
    trimmed = Trim(build("llama"))(batch_of("llama", [9, 5, 11]))
    layout = layout_of(trimmed, has_decoder=False)
    assert layout.sizes == Sizes(3, 11, None, 19)
    resized = layout.resized(Sizes(2, 7, None, 30))
    assert {name: tuple(tensor.shape) for name, tensor in resized.items()} == {
        "input_ids": (2, 7),
        "attention_mask": (2, 7),
        "labels": (1, 30),
        "shift_labels": (1, 30),
        TARGET_POSITIONS: (30,),
    }


def test_a_trimmed_step_costs_less_by_the_padding_and_the_head() -> None:
    """The head's share by its closed form: 2 FLOPs a weight and position, in each of three products."""
    model = build("llama").train()
    batch = batch_of("llama", [14, 14, 14], prompt=6)
    with Trim(model) as trim:
        whole, trimmed = gtflops.profile(model, batch), gtflops.profile(model, trim(batch))
    positions = 3 * 14 - 3 * 8
    saved = whole.step_flops("all", ops="matmul").total - trimmed.step_flops("all", ops="matmul").total
    assert saved == 3 * 2 * 32 * VOCABULARY * positions


# --- in loops -----------------------------------------------------------------------------------------------------


def batches_of(family: str, number: int = 6) -> list[Batch]:
    torch.manual_seed(5)
    lengths = torch.randint(3, 15, (number, 3)).tolist()
    return [batch_of(family, of_batch, prompt=1 + at % 2) for at, of_batch in enumerate(lengths)]


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow), "bert"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_executes_what_is_planned(family: str, accumulate: int) -> None:
    torch.manual_seed(0)
    model, batches = model_of(family), batches_of(family)
    trainer = GreenTrainer(model, optimizer_of(model), batches[0], 0.6, 2, trim="auto", count_executed=True)
    log = trainer.fit(batches, accumulate=accumulate)
    assert log.executed_flops == log.planned_flops
    assert log.planned_flops <= 0.6 * log.full_flops
    assert not hooks_of(model)
    whole = GreenTrainer(model, optimizer_of(model), batches[0], None)
    assert trainer.profile.full_flops < whole.profile.full_flops
    assert log.full_flops < sum(gtflops.profile(model, batch).full_flops for batch in batches)


def test_fit_trains_as_on_the_whole_batches() -> None:
    batches = batches_of("llama")
    torch.manual_seed(0)
    models = [model_of("llama").double().eval()]
    models.append(copy.deepcopy(models[0]))
    losses = []
    for model, trim in zip(models, ("auto", None), strict=True):
        log = GreenTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), batches[0], None, trim=trim).fit(batches)
        losses.append([step.loss for step in log.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model, batches = model_of("llama"), batches_of("llama")
    optimizer = optimizer_of(model)
    trainer = GreenTrainer(model, optimizer, batches[0], 0.6, 3, trim="auto")
    for whole in batches:
        batch = trainer.trimmed(whole)
        record = trainer.step_boundary(batch)
        with ExecutedFlops() as executed:
            model(**batch).loss.backward()
        assert executed.total == record.planned_flops
        optimizer.step()
        optimizer.zero_grad()
    trainer.untrim()
    assert not hooks_of(model)


def test_fit_leaves_no_hooks_after_an_error() -> None:
    model, batches = model_of("llama"), batches_of("llama")
    trainer = GreenTrainer(model, optimizer_of(model), batches[0], None, trim="auto")
    broken = {**batches[1], "input_ids": batches[1]["input_ids"] + 1000}
    with pytest.raises(gtflops.GtflopsError):
        trainer.fit([batches[0], broken])
    assert not hooks_of(model)


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    rows = [
        {name: tensor[row] for name, tensor in batch.items()} for batch in batches_of("llama", 5) for row in range(3)
    ]
    lengths = [int(row["attention_mask"].sum()) for row in rows]

    def trainer() -> GreenTrainer:
        torch.manual_seed(0)
        model = model_of("llama")
        return GreenTrainer(model, optimizer_of(model), next(iter(loader)), 0.6, 2, trim="auto")

    def fit(folder: Path, steps: int, **more: Any) -> Any:
        return trainer().fit(loader, epochs=3, num_steps=steps, checkpoints=folder, **more)

    loader = DataLoader(rows, batch_sampler=ByLength(lengths, 3))  # type: ignore[arg-type]
    whole = fit(tmp_path / "whole", 10)
    fit(tmp_path / "parts", 7)
    resumed = fit(tmp_path / "parts", 10, resume=True)
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    assert [step.planned_flops for step in resumed.steps] == [step.planned_flops for step in whole.steps]


def trainer_of(model: Any, folder: Path, callback: GreenTrainerCallback | None, **more: Any) -> Trainer:
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches_of("llama") for row in range(3)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **more.pop("arguments", {}),
    )
    kind = more.pop("kind", Trainer)
    return kind(model, arguments, train_dataset=rows, callbacks=[] if callback is None else [callback], **more)


class Counting(Trainer):
    """Counts what its real training steps execute."""

    executed = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "backward" in vars(self.accelerator):  # gtflops traces, or measures importance
            return super().training_step(*args, **kwargs)
        with ExecutedFlops() as executed:
            loss = super().training_step(*args, **kwargs)
        self.executed += executed.total
        return loss


def test_a_trainer_executes_what_is_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("llama")
    callback = GreenTrainerCallback(0.6, every=2, trim="auto")
    trainer = trainer_of(model, tmp_path, callback, kind=Counting)
    trainer.train()
    assert len(callback.log.steps) == 4
    assert trainer.executed == callback.log.planned_flops <= 0.6 * callback.log.full_flops
    assert not hooks_of(model)


def test_a_trainer_trains_as_on_the_whole_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [build("llama").double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    full = []
    for model, trim in zip(models, ("auto", None), strict=True):
        callback = GreenTrainerCallback(1.0, every=2, choose=lambda profile, step: profile.names, trim=trim)
        trainer_of(model, tmp_path, callback, arguments={"optim": "sgd"}).train()
        full.append(callback.log.full_flops)
    assert full[0] < 0.9 * full[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_trainer_with_a_loss_of_its_own_is_left(tmp_path: Path) -> None:
    callback = GreenTrainerCallback(1.0, trim="auto")
    trainer = trainer_of(build("llama"), tmp_path, callback, arguments={"label_smoothing_factor": 0.1})
    with pytest.warns(UserWarning, match="trim: the loss is one of your own"):
        trainer.train()
    assert len(callback.log.steps) == 4


# --- with reuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_activations_are_found_again_for_trimmed_batches(family: str, tmp_path: Path) -> None:
    model, whole = model_of(family).eval(), batch_of(family, [9, 5, 11])
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0"] if family == "t5" else ["model.layers.0"]
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(not name.startswith((*blocks, "model.embed", "shared", "encoder", "lm_head")))
    prefix = Prefix(model, blocks, ActivationStore(tmp_path))
    losses = []
    with Trim(model) as trim:
        batch = trim(whole)
        for _ in range(2):
            with prefix.for_batch(batch) as reused:
                losses.append((reused, model(**batch).loss.item()))
        other = trim({name: tensor[:2] for name, tensor in whole.items()})  # shorter, with fewer labels
        with prefix.for_batch(other) as reused:
            losses.append((reused, model(**other).loss.item()))
        assert losses[0] == (False, losses[1][1])
        assert losses[1][0]
        if family == "llama":
            assert reused
            assert losses[2][1] == pytest.approx(model(**other).loss.item(), rel=1e-5)


def test_a_label_at_padding_keeps_a_row_whole() -> None:
    batch = batch_of("llama", [9, 5, 11])
    batch["labels"][1, 7:9] = 3
    trimmed = Trim(build("llama"))(batch)
    inputs = {name: trimmed[name] for name in ("input_ids", "attention_mask")}
    assert all(example.tokens is None for example in examples_of(inputs, positions_read("next token", trimmed)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_first_token_that_is_predicted_from_padding(family: str) -> None:
    """Attention from padding in front goes to all columns alike, so that none may be cut."""
    model, batch = model_of(family), batch_of(family, [9, 5, 11], left=True, prompt=0)
    with pytest.warns(UserWarning, match="predicted from the padding in front"):
        trimmed = Trim(model)(batch)
    assert trimmed["input_ids"].shape == (3, 14)


# --- batches by length --------------------------------------------------------------------------------------------


def test_batches_by_length_hold_every_example_once() -> None:
    lengths = torch.randint(1, 50, (1003,)).tolist()
    order = by_length(lengths, 4)
    assert sorted(order) == list(range(1003))
    batches = [[lengths[index] for index in order[at : at + 4]] for at in range(0, 1000, 4)]
    spread = [max(batch) - min(batch) for batch in batches]
    assert sum(spread) / len(spread) < 2  # of 50
    means = [lengths[index] for index in order[:100]]
    assert max(means) - min(means) > 30  # batches are in no order of length
    assert by_length(lengths, 4, torch.Generator().manual_seed(1)) == by_length(
        lengths, 4, torch.Generator().manual_seed(1)
    )


def test_a_sampler_of_batches_by_length() -> None:
    assert len(ByLength([1] * 10, 4)) == 2 == len(list(ByLength([1] * 10, 4)))
    assert len(ByLength([1] * 10, 4, drop_last=False)) == 3 == len(list(ByLength([1] * 10, 4, drop_last=False)))
    with pytest.raises(InputError, match="3 examples do not fill a batch of 4"):
        ByLength([1, 2, 3], 4)
    torch.manual_seed(3)
    first = list(ByLength(range(1, 9), 2))
    torch.manual_seed(3)
    assert list(ByLength(range(1, 9), 2)) == first


def test_epochs_of_grouped_batches() -> None:
    examples = [Example("one two three" if at % 3 else "one", "", "cat") for at in range(17)]
    shared = {"batch_size": 2, "seq_len": 16, "seed": 1, "grouped": True}
    loaders = [EpochBatches(examples, word_tokenizer(), **shared, part=part, parts=2) for part in (0, 1)]  # type: ignore[arg-type]
    for epoch in (0, 1, 0):
        for loader in loaders:
            loader.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        assert len(batches[0]) == len(batches[1]) == len(loaders[0]) == 4
        used = [[int(batch["attention_mask"].sum(dim=1).max()) for batch in of] for of in batches]
        assert sum(one == other for one, other in zip(*used, strict=True)) >= 2
    again = list(loaders[0])
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(again, batches[0], strict=True))


@pytest.mark.parametrize("scheme", ["greentrainer", pytest.param("lora", marks=pytest.mark.slow)])
def test_fine_tuning_by_length(scheme: str) -> None:
    words = WORDS.split()
    examples = tuple(Example(" ".join(words[at : at + 2 + at % 9]), "", words[at]) for at in range(24))
    data = DataSet("words", examples, examples[:5], (), 16, 4, "rouge")
    settings = FineTuneSettings(steps=6, batch_size=2, seq_len=16, scheme=scheme, every=3, count_executed=True)
    runs = []
    for trim in (None, "auto"):
        torch.manual_seed(0)
        model = build("opt")
        runs.append(finetune(model, word_tokenizer(), data, replace(settings, trim=trim)))
        assert not hooks_of(model)
    for run in runs:
        assert run.log.executed_flops == run.log.planned_flops
        assert run.counted.planned == run.counted.executed
    whole, trimmed = runs
    assert trimmed.full_step_flops == whole.full_step_flops
    assert trimmed.flops_share < 0.8 * whole.flops_share
