"""verify: the user's own check, which must find a wrong prediction."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gtflops
from gtflops.cli import app
from small_models import build, padded_batch
from zoo import ZOO, sum_of_squares


def test_a_right_profile_is_found_exact() -> None:
    model, batch = build("llama"), padded_batch()
    profile = gtflops.profile(model, batch)
    found = profile.verify(model, batch, selections=3)
    assert found.exact
    assert [check.selection for check in found.checks] == [
        "none",
        "all",
        "first",
        "last",
        *(f"random {n}" for n in (1, 2, 3)),
    ]
    assert found.checks[1].predicted == found.checks[1].executed == profile.full_flops
    for check in found.checks:
        assert check.predicted_matmul == check.pytorch
    assert found.fvcore.flops == found.forward_matmul
    assert found.fvcore.skipped["aten::silu"] == 3
    json.dumps(found.to_json())


def test_a_wrong_price_is_found() -> None:
    """The profile says one FLOP more for one operator of the backward pass."""
    model, batch = build("opt"), padded_batch()
    profile = gtflops.profile(model, batch)
    prices = profile.prices.copy()
    node = profile.graph.gradients[profile.names[2]]
    prices[0, node] += 1
    found = replace(profile, prices=prices).verify(model, batch, selections=[[profile.names[2]], [profile.names[0]]])
    assert [check.exact for check in found.checks] == [False, True]
    (difference,) = found.checks[0].differences
    assert difference.predicted == difference.other + 1
    assert not found.exact
    assert f"predicted {difference.predicted:,}, executed {difference.other:,}" in " ".join(found.explanations())


def test_what_other_counters_lack_is_explained() -> None:
    """PyTorch counts the weight gradient of a grouped convolution once a group, and no product with a vector."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(4, 4, 3, groups=4)
            self.vector = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x).flatten(0, 2) @ self.vector

    model, x = Odd(), torch.randn(2, 4, 8, 8)
    found = gtflops.profile(model, x, sum_of_squares).verify(model, x, sum_of_squares)
    assert found.exact
    told = " ".join(found.explanations())
    assert "aten.mv: PyTorch's counter has no formula for it" in told
    assert "aten.convolution_backward: PyTorch's counter has another formula for it" in told
    assert "without its factor of groups" in told


@pytest.mark.parametrize("name", ["multihead-attention-batch-first", "embedding-bag", "lstm-two-layers"])
def test_operators_under_another_name_are_no_difference(name: str) -> None:
    case = ZOO[name]()
    found = gtflops.profile(case.model, case.batch, case.loss).verify(case.model, case.batch, case.loss)
    assert found.exact


def test_the_model_is_left_as_it_was() -> None:
    case = ZOO["resnet-train"]()
    model = case.model
    model.classifier[1].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    profile = gtflops.profile(model, case.batch)
    state, flags = copy.deepcopy(model.state_dict()), [tensor.requires_grad for tensor in model.parameters()]
    seed = torch.get_rng_state()
    profile.verify(model, case.batch, selections=1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert flags == [tensor.requires_grad for tensor in model.parameters()]
    assert all(tensor.grad is None for tensor in model.parameters())
    assert torch.equal(seed, torch.get_rng_state())


def test_fvcore_may_fail() -> None:
    class Dictionary(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": super().forward(x), 3: None}

    model, x = Dictionary(3, 3), torch.ones(2, 3)

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs["a"].sum()

    found = gtflops.profile(model, x, loss).verify(model, x, loss, selections=0)
    assert found.exact
    assert found.fvcore.flops is None
    assert found.fvcore.problem


@pytest.mark.parametrize("selections", [-1, "all", 1.5, [["no.such.tensor"]]])
def test_selections_that_do_not_fit(selections: Any) -> None:
    model, batch = build("llama"), padded_batch()
    with pytest.raises(gtflops.InputError):
        gtflops.profile(model, batch).verify(model, batch, selections=selections)


def test_another_model_is_refused() -> None:
    profile = gtflops.profile(build("llama"), padded_batch())
    with pytest.raises(gtflops.InputError, match="expected the model that was profiled"):
        profile.verify(build("opt"), padded_batch())


def test_command() -> None:
    arguments = ["verify", "facebook/opt-125m", "--batch-size", "2", "--seq-len", "16", "--selections", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "random 2" in result.output
    assert "by fvcore" in result.output
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert data["exact"]
    assert len(data["checks"]) == 6


def test_the_command_fails_where_a_step_is_not_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    step_prices = gtflops.Profile.from_graph

    def wrong(*arguments: Any) -> gtflops.Profile:
        profile = step_prices(*arguments)
        return replace(profile, prices=profile.prices + np.eye(2, profile.prices.shape[1], 200, dtype=np.int64))

    monkeypatch.setattr(gtflops.Profile, "from_graph", wrong)
    result = CliRunner().invoke(app, ["verify", "facebook/opt-125m", "--batch-size", "1", "--seq-len", "8"])
    assert result.exit_code == 1
    assert "-2" in result.output


def test_models_that_write_into_their_weights_are_left_alone() -> None:
    class Renorm(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(tokens)

    model, tokens = Renorm(9, 4, max_norm=0.1), torch.randint(0, 9, (2, 3))
    before = model.weight.detach().clone()
    assert gtflops.profile(model, tokens, sum_of_squares).verify(model, tokens, sum_of_squares).exact
    assert torch.equal(before, model.weight)


def test_another_batch_is_refused_with_what_would_work() -> None:
    model = build("opt")
    profile = gtflops.profile(model, padded_batch())
    with pytest.raises(gtflops.InputError, match=r"expected a batch of the same shapes, .*profile\.at"):
        profile.verify(model, padded_batch(seq_len=12))
    with pytest.raises(gtflops.InputError, match=r"expected the torch\.nn\.Module"):
        profile.verify(None, padded_batch())  # type: ignore[arg-type]


def test_where_pytorchs_counter_fails() -> None:
    case = ZOO["gradient-penalty"]()
    found = gtflops.profile(case.model, case.batch, case.loss).verify(case.model, case.batch, case.loss)
    assert found.exact
    assert {check.pytorch for check in found.checks[1:]} == {None}
    assert "PyTorch's counter fails on this model" in found.explanations()


def test_a_saved_profile_has_no_model_to_run(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    gtflops.profile(build("opt"), padded_batch()).save(path)
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert "holds no model to run" in str(result.exception)
