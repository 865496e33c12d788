"""What a step costs whose frozen prefix is stored, and the selection under such costs."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import gtflops
from gtflops.blocks import block_of
from gtflops.report.summary import summarise
from gtflops.reuse import ActivationStore, Prefix
from small_models import CONFIGS, VOCABULARY, padded_batch

SMALL = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}


def causal(family: str) -> tuple[Any, dict[str, Any]]:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager")
    return model, padded_batch()


def t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(**SMALL, decoder_start_token_id=0, attn_implementation="eager")
    return transformers.T5ForConditionalGeneration(config), padded_batch()


def bert() -> tuple[Any, dict[str, Any]]:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    return transformers.BertForMaskedLM(config), padded_batch()


def vit() -> tuple[Any, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.rand(3, 3, 16, 16),
        "labels": torch.tensor([0, 1, 1]),
    }


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **{family: lambda family=family: causal(family) for family in ("llama", "llama-tied", "opt", "bloom", "gpt2")},
    "t5": t5,
    "bert": bert,
    "vit": vit,
}


@pytest.mark.parametrize("family", MODELS)
def test_a_block_depends_on_just_the_tensors_that_change_what_it_gives(family: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[family]()
    profile = gtflops.profile(model.train(), batch)
    modules = {block.name: model.get_submodule(block.name) for block in profile.blocks}

    def outputs(of: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            of.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: found.update(
                    {name: output[0] if isinstance(output, tuple) else output}
                )
            )
            for name in modules
        ]
        with torch.no_grad():
            of(**batch)
        for hook in hooks:
            hook.remove()
        return found

    reference = outputs(model.eval())
    for position, name in enumerate(profile.names):
        if not profile.tensors[position].has_gradient:
            continue
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).add_(torch.randn_like(other.get_parameter(name)))
        changed = {block for block, output in outputs(other).items() if not torch.equal(output, reference[block])}
        depending = {block.name for block in profile.blocks if block.depends_on >> position & 1}
        # A key's bias moves all scores of a row alike, and the softmax takes that away again.
        assert changed <= depending, name
        assert depending <= changed or re.search(r"(k_proj|key)\.bias$", name), name


@pytest.mark.parametrize("family", MODELS)
def test_the_first_and_later_epochs_execute_what_is_predicted(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[family]()
    model.eval()
    profile = gtflops.profile(model, batch)
    assert len(profile.blocks) == sum(block_of(name) == name for name, _ in model.named_modules())
    for block in profile.blocks[1:]:
        above = [name for name, tensor in model.named_parameters() if block_of(name) == block.name and tensor.ndim == 2]
        steps = profile.step_flops(above, reuse="prefix"), profile.step_flops(above, "matmul", reuse="prefix")
        positions = batch["labels"].numel() if "input_ids" in batch else 3 * 5
        lists = {name.rsplit(".", 1)[0] for name in steps[0].blocks}
        assert steps[0].blocks
        assert block.name not in steps[0].blocks
        assert steps[0].cache_bytes == len(lists) * positions * 32 * 4

        for name, tensor in model.named_parameters():
            tensor.requires_grad_(name in above)
        prefix = Prefix(model, steps[0].blocks, ActivationStore(tmp_path / block.name))
        executed = []
        for epoch in range(2):
            model.zero_grad(set_to_none=True)
            with prefix.for_batch(batch) as reused, gtflops.ExecutedFlops() as counted:
                model(**batch).loss.backward()
            assert reused == (epoch == 1)
            executed.append((counted.total, counted.flops.matmul))
        assert executed == [tuple(step.first for step in steps), tuple(step.total for step in steps)]


@pytest.mark.parametrize("epochs_left", [1, 2, 5])
def test_a_selection_with_reuse_is_the_best_of_all(epochs_left: int) -> None:
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()) for _ in range(4)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(6, 2, bias=False))
    profile = gtflops.profile(model, torch.rand(5, 6), loss=lambda y, x: y.sum())
    draw = np.random.default_rng(epochs_left)
    importance = dict(zip(profile.names, draw.lognormal(size=len(profile.names)), strict=True))
    subsets = [np.array(subset) for subset in itertools.product([False, True], repeat=len(profile.names))]
    averages = []
    for subset in subsets:
        step = profile.step_flops(subset, reuse="prefix")
        exact = step.total + step.stored / epochs_left
        total = profile.form("flops", epochs_left).total(subset)
        assert exact <= total < exact + len(step.blocks) + 1e-9
        averages.append(total)
    worth = np.array([importance[name] for name in profile.names])
    for budget in (0.2, 0.3, 0.5, 0.8):
        limit = int(budget * profile.full_flops)
        fitting = [float(worth[subset].sum()) for subset, cost in zip(subsets, averages, strict=True) if cost <= limit]
        if max(fitting, default=0.0) == 0:
            with pytest.raises(
                gtflops.InfeasibleBudgetError,
                match=r"; (without reuse, none below|reuse='prefix' makes) 0\.\d+ .* the smallest feasible",
            ):
                gtflops.select(profile, importance, budget, reuse="prefix", epochs_left=epochs_left)
            continue
        best = gtflops.select(profile, importance, budget, reuse="prefix", epochs_left=epochs_left)
        assert best.optimal
        assert best.value == pytest.approx(max(fitting))
        assert best.flops == averages[int(sum(1 << i for i, chosen in enumerate(best.mask[::-1]) if chosen))]
        assert best.flops <= limit


def test_reuse_buys_more_than_the_same_budget_without(tmp_path: Any) -> None:
    profile = gtflops.profile("HuggingFaceTB/SmolLM2-135M", batch_size=4, seq_len=224)
    importance = {tensor.name: 1.0 * tensor.numel for tensor in profile.tensors}
    importance["model.embed_tokens.weight"] = 0.0  # tied to the head: training it leaves nothing constant
    without = gtflops.frontier(profile, importance, budgets=[0.4, 0.5, 0.6])
    with_reuse = gtflops.frontier(profile, importance, budgets=[0.2, 0.4, 0.5, 0.6], reuse="prefix", epochs_left=5)
    assert all(more.value > less.value for less, more in zip(without, list(with_reuse)[1:], strict=True))
    assert with_reuse[0].flops <= 0.2 * profile.full_flops
    path = tmp_path / "profile.json"
    profile.save(path)
    again = gtflops.select(gtflops.Profile.load(path), importance, 0.2, reuse="prefix", epochs_left=5)
    assert again.names == with_reuse[0].names


def test_batch_statistics_and_random_numbers_are_never_constant() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    def stored(first: torch.nn.Module) -> tuple[str, ...]:
        layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), first), *(torch.nn.Linear(4, 4) for _ in range(2))]
        profile = gtflops.profile(torch.nn.Sequential(*layers), torch.rand(3, 4), loss=lambda y, x: y.sum())
        return profile.step_flops(["2.weight"], reuse="prefix").blocks

    assert stored(torch.nn.Dropout(0.5)) == stored(torch.nn.BatchNorm1d(4).eval()) == ("0", "1")
    assert stored(torch.nn.BatchNorm1d(4)) == stored(Noisy()) == ()
    spectral = torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4))  # moves its buffers at each forward pass in training
    assert stored(spectral) == ()


@pytest.mark.parametrize("reuse", [{}, {"reuse": "prefix", "epochs_left": 3}])
def test_a_block_that_no_tensor_can_change(reuse: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    profile = gtflops.profile(model, torch.ones(7, 2, 3), loss=lambda y, x: y.sum())
    importance = dict.fromkeys(profile.names, 1.0)
    assert gtflops.select(profile, importance, 0.9, **reuse).optimal
    with pytest.raises(gtflops.InfeasibleBudgetError, match="below the forward pass alone"):
        gtflops.select(profile, importance, 0.01, **reuse)


def test_input_gradients_are_refused() -> None:
    model, batch = MODELS["llama"]()
    model.enable_input_require_grads()
    profile = gtflops.profile(model.train(), batch)
    with pytest.raises(gtflops.InputError, match=r"model\.disable_input_require_grads\(\) ends them"):
        profile.step_flops(["lm_head.weight"], reuse="prefix")
    with pytest.raises(gtflops.InfeasibleBudgetError, match=r"input gradients included .* of a full step\)"):
        gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 0.01)


def test_a_report_of_a_selection_with_reuse_adds_up(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    profile = gtflops.profile(model, torch.rand(3, 4), loss=lambda y, x: y.sum())
    selection = gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 0.3, reuse="prefix", epochs_left=5)
    found = summarise(profile, selection).selection
    assert found is not None
    assert found.forward_flops + found.dy_flops + found.dw_flops == selection.flops
    assert found.dy_flops == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reuse": "prefix"}, "expected epochs_left"),
        ({"epochs_left": 3}, "epochs_left=3 given without reuse='prefix'"),
        ({"reuse": "all", "epochs_left": 3}, "reuse is 'all', expected 'prefix'"),
        ({"reuse": "prefix", "epochs_left": 0}, "epochs_left is 0, expected a positive integer"),
    ],
)
def test_wrong_reuse_is_named(arguments: dict[str, Any], message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    profile = gtflops.profile(model, torch.rand(3, 4), loss=lambda y, x: y.sum())
    with pytest.raises(gtflops.InputError, match=re.escape(message)):
        gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 0.9, **arguments)


def test_a_budget_below_the_forward_pass_says_what_reuse_would_do() -> None:
    profile = gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=128)
    with pytest.raises(
        gtflops.InfeasibleBudgetError,
        match=r"\(0\.33\d\d of a full step\); reuse='prefix' makes 0\.2\d\d\d feasible over many epochs; the smallest",
    ):
        gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 0.25)


def test_of_an_encoder_decoder_the_encoder_alone_is_reused() -> None:
    """The decoder is given labels, which are padded by the batch: prices and errors go by what a trainer holds."""
    model, batch = MODELS["t5"]()
    profile = gtflops.profile(model.train(), batch)
    encoder = tuple(block.name for block in profile.blocks if block.name.startswith("encoder."))
    last = [name for name in profile.names if name.startswith("decoder.block.2.")]
    assert profile.step_flops(last, reuse="prefix").blocks == encoder
    del batch["labels"]
    batch["decoder_input_ids"] = batch["input_ids"]
    given = gtflops.profile(model, batch, lambda outputs, batch: outputs.logits.sum())
    assert given.step_flops(last, reuse="prefix").blocks == encoder
    floor = 1 - profile.stored_flops(encoder) / profile.forward_flops  # the decoder and the head, of the forward pass
    importance = dict.fromkeys(profile.names, 1.0)
    with pytest.raises(gtflops.InfeasibleBudgetError, match=r"makes 0\.\d+ feasible over many epochs") as raised:
        gtflops.select(profile, importance, 0.05)
    named = float(re.findall(r"makes (0\.\d+) feasible", str(raised.value))[0])
    assert named > floor * profile.forward_flops / profile.full_flops


def infeasible(budget: float, **conditions: Any) -> str:
    """What is said of a budget for three layers."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    profile = gtflops.profile(model, torch.rand(3, 4), loss=lambda y, x: y.sum())
    with pytest.raises(gtflops.InfeasibleBudgetError) as raised:
        gtflops.select(profile, dict.fromkeys(profile.names, 1.0), budget, **conditions)
    return str(raised.value)


def test_an_infeasible_budget_names_both_floors() -> None:
    reuse: dict[str, Any] = {"reuse": "prefix", "epochs_left": 3}
    too_little = "leaves too little for any tensor of positive importance"
    makes = "; reuse='prefix' makes 0.0986 feasible over many epochs"
    assert f"{too_little}{makes}; the smallest" in infeasible(0.4)
    assert f"(0.4000 of a full step){makes}; the smallest" in infeasible(0.3)
    assert f"{too_little}; without reuse, none below 0.4087 is feasible; the smallest" in infeasible(0.19, **reuse)
    assert "run in one of 3 epochs (0.1391 of a full step); without reuse, none" in infeasible(0.1, **reuse)
    alone = infeasible(0.3, reuse="prefix", epochs_left=1)
    assert f"the forward pass alone (0.4000 of a full step){makes}, but only where an epoch begins that" in alone


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_reuse_that_changes_nothing_is_not_recommended(budget: float) -> None:
    assert "reuse" not in infeasible(budget, must_train="0.*")
    told = infeasible(budget, must_train="0.*", reuse="prefix", epochs_left=5)
    assert "reuse changes nothing, because nothing below what would be trained can be left out" in told


def test_a_model_without_blocks_is_refused() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())  # type: ignore[no-any-return]

    profile = gtflops.profile(Two(), torch.rand(3, 4), loss=lambda y, x: y.sum())
    importance = dict.fromkeys(profile.names, 1.0)
    for choose in (gtflops.select, gtflops.operating_point):
        with pytest.raises(gtflops.errors.UnsupportedModelError, match=r"Two has no blocks .* expected a ModuleList"):
            choose(profile, importance, reuse="prefix", epochs_left=5)
    assert profile.step_flops(["b.weight"], reuse="prefix").stored == 0
    with pytest.raises(gtflops.InfeasibleBudgetError, match=r"of a full step\); the smallest"):
        gtflops.select(profile, importance, 0.1)
