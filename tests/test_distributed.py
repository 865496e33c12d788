"""Two gloo processes: every rank ends with the same bits, those of one process; what fails on one fails on all."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import distributed_run as scenarios
import gtflops

NAMES = (
    "ddp",
    "every_kind_of_ddp",
    "without_gtflops",
    "accumulated",
    "shapes",
    "uneven",
    "refused",
    "different_selections",
    "different_places",
    "bad_batches",
    "interrupted",
    "interrupted_without_checkpoints",
    "resumed",
    "reused",
    "shared",
    "shared_and_sharded",
    "fsdp2",
    "accelerated",
    "in_the_trainer",
    "whole_in_the_trainer",
    "sharded_in_the_trainer",
    "broken_backward",
    "broken_forward",  # last: gloo's other groups may not outlive it
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario, in one pair of processes."""
    made = tmp_path_factory.mktemp("ranks")
    scenarios.run(made, NAMES)
    return made


def ranks(folder: Path, name: str) -> tuple[Any, Any]:
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    return first, second


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of the two ranks."""
    streams = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        streams.append(scenarios.stream())
    first, second = streams
    return first, second


def assert_close(found: dict[str, Any], model: torch.nn.Module) -> None:
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(torch.tensor(found[name]), tensor.detach(), rtol=1e-5, atol=1e-6)


def test_ranks_are_equal_to_the_bit_after_each_step(folder: Path) -> None:
    first, second = ranks(folder, "ddp")
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == scenarios.NUM_STEPS
    assert first["log"] == second["log"]
    assert len({tuple(record["names"]) for record in first["log"]["selections"]}) > 1


def test_two_ranks_are_one_process_that_accumulates_their_batches(
    folder: Path, batches: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    trainer = scenarios.trainer_for(scenarios.model(), batches[0][0])
    trainer.fit([batch for pair in zip(*batches, strict=True) for batch in pair], accumulate=2, measure_on=2)
    first, _ = ranks(folder, "ddp")
    assert_close(first["weights"], trainer.model)
    alone = scenarios.logged(trainer)
    for ours, theirs in zip(first["log"]["selections"], alone["selections"], strict=True):
        assert ours["names"] == theirs["names"]
        assert ours["importance"] == pytest.approx(theirs["importance"], rel=1e-4)
    for ours, theirs in zip(first["log"]["steps"], alone["steps"], strict=True):
        # One process adds the gradients of the second batch to those of the first; between two, that is DDP's.
        selected = first["selected"][ours["step"]]
        elements = sum(tensor.numel() for tensor in trainer.model.parameters())
        assert ours["planned_flops"] + selected == theirs["planned_flops"]
        assert ours["full_flops"] + elements == theirs["full_flops"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert first["log"]["measuring_flops"] == alone["measuring_flops"]


def test_only_what_is_selected_is_communicated(folder: Path) -> None:
    for result in ranks(folder, "ddp"):
        assert result["sent"] == [4 * selected for selected in result["selected"]]
        assert len(set(result["sent"])) > 1
        # What ran besides the step itself: each rank divides each selected gradient once.
        executed = [step["executed_flops"] - step["planned_flops"] for step in result["log"]["steps"]]
        assert executed == [2 * selected for selected in result["selected"]]


def test_freezing_and_thawing_diverge_without_gtflops_and_not_with_it(folder: Path) -> None:
    first, second = ranks(folder, "without_gtflops")
    assert first["frozen"] != second["frozen"]
    assert first["thawed"] != second["thawed"]
    first, second = ranks(folder, "every_kind_of_ddp")
    assert first == second
    assert set(first["digests"]) == {ranks(folder, "ddp")[0]["digests"][-1]}


def test_gradients_are_joined_once_a_step(folder: Path) -> None:
    first, second = ranks(folder, "accumulated")
    assert first["digest"] == second["digest"]
    assert first["sent"] == second["sent"] == scenarios.NUM_STEPS // 2 * 4 * first["numel"]


def test_ranks_with_different_shapes_select_the_same_within_the_budget(folder: Path) -> None:
    first, second = ranks(folder, "shapes")
    assert first == second
    assert len(set(map(tuple, first["trained"]))) > 1, "no step took a smaller selection"
    spent = allowed = 0
    for step in first["log"]["steps"]:
        spent += step["planned_flops"]
        allowed += step["full_flops"]
        assert spent <= 0.662 * allowed


def test_an_epoch_ends_where_the_first_rank_has_no_more_batches(folder: Path) -> None:
    first, second = ranks(folder, "uneven")
    assert first == second
    assert first["steps"] == 2 * 3


def test_models_that_cannot_be_joined_are_refused(folder: Path) -> None:
    for result in ranks(folder, "refused"):
        assert {failure[0] for failure in result.values()} == {"InputError"}
        assert "was wrapped in DistributedDataParallel after the trainer was built" in result["late"][1]
        assert "FSDP1" in result["fsdp1"][1]
        assert "with mixed_precision cannot be wrapped anew" in result["mixed"][1]


def test_different_selections_stop_every_rank(folder: Path) -> None:
    for result in ranks(folder, "different_selections"):
        name, message = result["failure"]
        assert name == "ProcessesError"
        assert message.startswith("the selection must be the same on every rank, and is not: rank 0: ")
        assert "rank 1: " in message
        assert result["steps"] == 0


def test_ranks_that_do_different_things_stop(folder: Path) -> None:
    for result in ranks(folder, "different_places"):
        name, message = result["failure"]
        assert name == "ProcessesError"
        assert "rank 0 is at 'the batch to select on'; rank 1 is at 'FLOPs'" in message
        assert result["steps"] == 2


def test_what_one_rank_refuses_stops_all_and_moves_nothing(folder: Path) -> None:
    first, second = ranks(folder, "bad_batches")
    assert (first["digest"], first["steps"]) == (second["digest"], second["steps"]) == (first["digest"], 9)
    for (_, whose), (_, own) in zip(first["failures"], second["failures"], strict=True):
        assert re.fullmatch(r"another process failed, so this one stops too: rank 1: \w+: (.*)", whose)[1] == own
    messages = [message for _, message in second["failures"]]
    assert "the loss is nan at step 1" in messages[0]
    assert "refused the batch" in messages[1]
    assert "the loss is nan" in messages[2]


def test_sigterm_to_one_rank_stops_all_after_the_same_step(folder: Path) -> None:
    assert [result["steps"] for result in ranks(folder, "interrupted")] == [3, 3]
    assert ranks(folder, "interrupted")[0]["stopped"] == "interrupted after 3 steps"
    assert [path.name for path in (folder / "interrupted").iterdir()] == ["step-000000003"]


def test_sigterm_to_one_rank_without_checkpoints_is_an_exception_on_all(folder: Path) -> None:
    for result in ranks(folder, "interrupted_without_checkpoints"):
        assert result == {"stopped": "interrupted after 3 steps", "steps": 3}


BROKEN = "another process failed, so this one stops too: rank 1: RuntimeError: out of memory, say"


def test_a_backward_pass_that_breaks_on_one_rank_ends_by_the_timeout_on_the_others(folder: Path) -> None:
    first, second = ranks(folder, "broken_backward")
    assert first == {"failure": ["ProcessesError", BROKEN], "steps": 3}
    assert second == {"failure": ["RuntimeError", "out of memory, say"], "steps": 3}


def test_a_forward_pass_that_breaks_on_one_rank_among_shards(folder: Path) -> None:
    first, second = ranks(folder, "broken_forward")
    assert first["failure"][0] == "ProcessesError"
    assert "rank 1: RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 7x7)" in first["failure"][1]
    assert "refused the batch float32[4, 8]" in second["failure"][1]
    assert first["steps"] == second["steps"] == 1


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("bad_rows_in_the_trainer", "OSError: no such row"),
        ("broken_step_in_the_trainer", "RuntimeError: out of memory, say"),
    ],
)
def test_what_breaks_in_the_trainer_on_one_rank_ends_all(name: str, failure: str, tmp_path: Path) -> None:
    """The others hear of it when its process ends, and not after the half hour that is gloo's timeout."""
    started = time.monotonic()
    scenarios.run(tmp_path, [name])
    assert time.monotonic() - started < 240
    first, second = ranks(tmp_path, name)
    assert ": ".join(second["failure"]) == failure
    assert first["failure"] == ["ProcessesError", f"another process failed, so this one stops too: rank 1: {failure}"]
    assert first["frozen"] == second["frozen"] == 0


def test_torchrun_ends_all_ranks_where_the_backward_pass_breaks_on_one(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", scenarios.__file__]
    ended = subprocess.run(
        [sys.executable, *command, str(tmp_path), "fails_and_ends"],
        env=scenarios.environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "RuntimeError: out of memory, say" in ended.stderr


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    for result in ranks(folder, "resumed"):
        assert result["resumed"] == result["whole"]
    first, second = ranks(folder, "resumed")
    assert first == second


def test_a_checkpoint_of_two_ranks_is_for_two_ranks(folder: Path) -> None:
    dropped = torch.nn.Sequential(torch.nn.Dropout(0.3), scenarios.model())
    trainer = scenarios.trainer_for(dropped, scenarios.stream()[0])
    with pytest.raises(gtflops.InputError, match="is of a run with processes=2, expected the same, not 1"):
        trainer.fit(scenarios.stream(), checkpoints=folder / "resumed", resume=True)


def test_fsdp2_is_one_process_on_the_joined_batches(
    folder: Path, batches: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    joined = [torch.cat(pair) for pair in zip(*batches, strict=True)]
    trainer = scenarios.trainer_for(scenarios.model(), joined[0], max_grad_norm=1.0)
    trainer.fit(joined)
    first, second = ranks(folder, "fsdp2")
    assert first["log"] == second["log"]
    assert first["weights"] == second["weights"]
    assert_close(first["weights"], trainer.model)
    for ours, theirs in zip(first["log"]["selections"], scenarios.logged(trainer)["selections"], strict=True):
        assert ours["names"] == theirs["names"]
        assert ours["importance"] == pytest.approx(theirs["importance"], rel=1e-4)
    assert all(step["executed_flops"] == step["planned_flops"] for step in first["log"]["steps"])
    assert len(set(first["scattered"])) > 1
    assert first["scattered"] == [4 * elements for elements in first["padded"]], "of what is not selected"


def test_fsdp2_resumes_to_the_bit_and_fails_together(folder: Path) -> None:
    first, second = ranks(folder, "fsdp2")
    for result in (first, second):
        assert (result["resumed_log"], result["resumed_weights"]) == (result["log"], result["weights"])
    assert first["failure"][1].endswith(second["failure"][1])
    assert "the loss is nan" in second["failure"][1]


def test_accelerates_plain_loop(folder: Path) -> None:
    first, second = ranks(folder, "accelerated")
    assert first == second
    assert first["sent"] == [4 * selected for selected in first["selected"]]
    assert len(set(first["digests"])) == 4


def test_the_callback_in_a_trainer_that_wraps_the_model_itself(folder: Path) -> None:
    first, second = ranks(folder, "in_the_trainer")
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 9
    assert len(first["names"]) == 3
    assert first["names"] == second["names"]
    assert first["planned"] == second["planned"] <= 0.6 * first["full"]
    # The Trainer adds the processes' numbers in float32.
    assert first["total_flos"] == second["total_flos"] == pytest.approx(first["planned"] + first["measuring"], rel=1e-6)
    assert first["drops"] == second["drops"]
    ((predicted, real),) = first["drops"]  # it held
    assert real == pytest.approx(predicted, rel=0.5)


def test_fsdp_on_the_cpu_is_ddp_and_that_is_said(folder: Path) -> None:
    first, second = ranks(folder, "whole_in_the_trainer")
    for result in (first, second):
        (message,) = (text for text in result["warnings"] if "asks for FSDP" in text)
        assert "accelerate trains by DistributedType.MULTI_CPU instead" in message
    assert first["digests"] == second["digests"]


def test_fsdp2_in_the_trainer_is_one_process_on_the_joined_batches(folder: Path, tmp_path: Path) -> None:
    first, second = ranks(folder, "sharded_in_the_trainer")
    trainer = scenarios.trainer_on(tmp_path, batch_size=4)
    alone = scenarios.trained(trainer)
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 6
    assert first["names"] == second["names"] == [list(names) for names in alone["names"]]
    assert first["planned"] == first["executed"] + second["executed"]
    assert first["planned"] <= 0.6 * first["full"]
    assert first["total_flos"] == pytest.approx(first["planned"] + first["measuring"], rel=1e-6)
    assert first["drops"] == second["drops"]
    for ours, theirs in zip(first["drops"], alone["drops"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)
    for name, tensor in trainer.model.named_parameters():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), tensor.detach(), rtol=1e-3, atol=1e-4)


def test_ranks_reuse_a_frozen_prefix(folder: Path) -> None:
    """The weights are those without reuse to the bit, within rounding where rows are shuffled over batches and ranks; a
    rank that lacks an entry computes it."""
    first, second = ranks(folder, "reused")
    for run in ("without", "with", "by_importance"):
        assert first[run] == second[run], run
    elements = sum(tensor.numel() for name, tensor in scenarios.model().named_parameters() if int(name[0]) >= 4)
    for run in ("without", "with"):  # DDP divides the gradients of each rank
        steps = first[run]["log"]["steps"]
        assert [step["executed_flops"] - step["planned_flops"] for step in steps] == [2 * elements] * 12
    assert first["with"]["digest"] == first["without"]["digest"]
    is_reused = [step["reused"] for step in first["with"]["log"]["steps"]]
    assert is_reused[:3] == [False] * 3
    assert not all(is_reused[4:7])
    assert all(is_reused[9:])
    for run in ("shuffled_without", "shuffled_with"):
        assert first[run] == second[run], run
    for name, without in first["shuffled_without"]["weights"].items():
        found, expected = torch.tensor(first["shuffled_with"]["weights"][name]), torch.tensor(without)
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name
    # Rows that the other rank stored are found, too.
    assert [step["reused"] for step in first["shuffled_with"]["log"]["steps"]] == [False] * 3 + [True] * 9
    by_importance = first["by_importance"]["log"]
    assert all(record["held"] for record in by_importance["selections"])
    steps = by_importance["steps"]
    assert sum(step["planned_flops"] for step in steps) <= 0.5 * sum(step["full_flops"] for step in steps)


def test_uses_of_a_shared_tensor_are_trained_by_two_ranks_as_by_one(
    folder: Path, batches: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> None:
    first, second = ranks(folder, "shared")
    assert first == second
    assert first["tied"]
    assert len(set(first["digests"])) == scenarios.NUM_STEPS
    alone = scenarios.trainer_for(
        scenarios.tied(), batches[0][0], uses="separate", choose=lambda profile, step: scenarios.USES[step // 2]
    )
    alone.fit([batch for pair in zip(*batches, strict=True) for batch in pair], accumulate=2)
    assert_close(first["weights"], alone.model)
    partial = [record["partial"] for record in first["log"]["selections"]]
    assert partial == [["8.weight"], ["0.weight"], []]
    for error in (result["error"] for result in ranks(folder, "shared_and_sharded")):
        assert error[0] == "UnsupportedModelError"
        assert "fully_shard has spread over processes" in error[1]
