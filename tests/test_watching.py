"""Watching: lines that survive a killed run, a bar that is the same on each terminal, scalars for TensorBoard."""

import builtins
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import gtflops
from gtflops.errors import InputError, SavedFileError
from gtflops.training.watching import JsonLines, ProgressBar, TensorBoard, read_log, to_json


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    planned_flops: int = 600
    full_flops: int = 1000
    executed_flops: int | None = None
    seconds: float = 2.0


@dataclass(frozen=True)
class Chosen:
    step: int
    selection: Any = None
    seconds: float = 4.0
    budget: float | None = 0.6
    names: tuple[str, ...] = ("head.weight",)


def write(path: Path, steps: range, *, resumed: bool = False) -> None:
    """A log in which tensors are selected anew before every third step."""
    log = JsonLines(path)
    log.on_start(steps.start, 9, resumed)
    for step in steps:
        if step % 3 == 0:
            log.on_selection(Chosen(step))
        log.on_step(Step(step, 1 / (step + 1)))
    log.on_end()


# --- JSON lines -------------------------------------------------------------------------------------------------


def test_each_record_is_a_line_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.on_start(0, None, False)
    assert read_log(log.path) == []
    log.on_selection(Chosen(0))
    log.on_step(Step(0, 2.5))
    assert log.path.read_text(encoding="utf-8") == (
        '{"record": "selection", "step": 0, "selection": null, "seconds": 4.0, "budget": 0.6, '
        '"names": ["head.weight"]}\n'
        '{"record": "step", "step": 0, "loss": 2.5, "planned_flops": 600, "full_flops": 1000, '
        '"executed_flops": null, "seconds": 2.0}\n'
    )
    assert [line["record"] for line in read_log(log.path)] == ["selection", "step"]


@pytest.mark.parametrize("checkpoint", [0, 2, 3, 5])
@pytest.mark.parametrize("torn", ["", '{"record": "st', "\x00"])
def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path: Path, checkpoint: int, torn: str) -> None:
    """Killed in step 5, where the last line may be cut off; step 3 begins with a selection, which is made again."""
    write(tmp_path / "whole.jsonl", range(9))
    killed = tmp_path / "killed.jsonl"
    write(killed, range(5))
    with killed.open("a", encoding="utf-8") as file:
        file.write(torn)
    write(killed, range(checkpoint, 9), resumed=True)
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_second_fit_goes_on_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", range(9))
    for steps in (range(4), range(4, 9)):
        write(tmp_path / "parts.jsonl", steps)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_new_run_overwrites_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(2))
    before = path.read_bytes()
    with pytest.raises(InputError, match="has 3 lines of another run; expected a new file"):
        write(path, range(2))
    assert path.read_bytes() == before


def test_a_new_run_may_replace_another(tmp_path: Path) -> None:
    """Whatever is there; a run that is resumed goes on in it all the same."""
    path = tmp_path / "log.jsonl"
    path.write_text("what somebody wrote\n")
    JsonLines(path, replace=True).on_start(0, 9, False)
    assert path.read_text() == ""
    write(path, range(2))
    JsonLines(path, replace=True).on_start(1, 9, True)
    assert [line["step"] for line in read_log(path)] == [0, 0]


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"record": "step"}', '{"record": "step", "step": 1.5}', '{"step": 1}', ""]
)
def test_lines_that_are_no_records(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(2))
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(SavedFileError, match=r"log\.jsonl, line 4 is "):
        read_log(path)
    before = path.read_bytes()
    with pytest.raises(SavedFileError, match=r"log\.jsonl, line 4 is "):
        write(path, range(2, 3), resumed=True)
    assert path.read_bytes() == before


def test_logs_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file or directory"):
        read_log(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SavedFileError, match="is not UTF-8"):
        read_log(tmp_path / "bytes.jsonl")
    log = JsonLines(tmp_path / "none" / "log.jsonl")
    with pytest.raises(InputError, match="cannot write"):
        log.on_start(0, None, False)
    with pytest.raises(InputError, match=r"cannot write .*; expected a file that can grow"):
        log.on_step(Step(0, 1.0))


def test_any_field_has_a_form() -> None:
    @dataclass(frozen=True)
    class Everything:
        step: int
        value: Any

    values: list[tuple[Any, Any]] = [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        (np.float64("inf"), None),
        ({"b", "a"}, ["a", "b"]),
        ({1: (True, None)}, {"1": [True, None]}),
        (Path("a/b"), "a/b"),
        (datetime(2026, 1, 31, tzinfo=UTC), "2026-01-31T00:00:00+00:00"),
        (Everything(1, float("nan")), {"step": 1, "value": None}),
        ("ü\n\u2028", "ü\n\u2028"),
    ]
    for value, expected in values:
        assert to_json(Everything(0, value)) == {"step": 0, "value": expected}
        assert json.loads(json.dumps(to_json(Everything(0, value)), allow_nan=False))["value"] == expected
    with pytest.raises(InputError, match="field 'value' is a object, which JSON has no form for"):
        to_json(Everything(0, object()))


def test_the_records_of_the_loop_have_a_form(tmp_path: Path) -> None:
    """A selection holds a whole profile; its line has its names and numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    batch = torch.randn(16, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = gtflops.GreenTrainer(model, optimizer, batch, 0.8, loss=lambda y, _: y.square().mean())
    log = JsonLines(tmp_path / "log.jsonl")
    log.on_start(0, 1, False)
    trainer.fit([batch], on_step=log.on_step)
    chosen = trainer.log.selections[0]
    log.on_selection(chosen)
    step, selection = read_log(log.path)
    assert step["planned_flops"] == trainer.log.planned_flops
    assert step["loss"] == trainer.log.steps[0].loss
    assert selection["selection"]["names"] == list(chosen.selection.names)
    assert selection["selection"]["flops"] == chosen.selection.flops
    assert selection["selection"]["optimal"] is True


# --- the progress bar -------------------------------------------------------------------------------------------


def shown(num_steps: int | None, steps: list[Step], start: int = 0, **terminal: Any) -> str:
    """The last state of the bar, without the codes that move the cursor."""
    out = StringIO()
    bar = ProgressBar(Console(file=out, width=100, color_system=None, **terminal), refresh_seconds=0)
    bar.on_start(start, num_steps, resumed=start > 0)
    bar.on_selection(Chosen(start))
    for step in steps:
        bar.on_step(step)
    bar.on_end()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").rstrip("\n").rsplit("\n", 1)[-1]


def test_the_bar() -> None:
    """4 s to select and 2 x 2 s to train: 4 s a step, 3 steps left. FLOPs: (600 + 400) / 2000."""
    line = shown(5, [Step(0, 2.0), Step(1, 1.23456, 400)], force_terminal=True)
    assert line == "━━━━━━━━             2/5 loss 1.2346, 50.0% of full FLOPs, 12.0 s left"


def test_the_bar_of_a_resumed_run() -> None:
    """What is left is worked out from the steps of this run: (4 + 2) s for one step."""
    line = shown(5, [Step(3, 0.5, 1000)], start=3, force_terminal=True)
    assert line == "━━━━━━━━━━━━━━━━     4/5 loss 0.5000, 100.0% of full FLOPs, 6.0 s left"


def test_the_bar_without_a_number_of_steps() -> None:
    line = shown(None, [Step(0, 2.0)], force_terminal=True)
    assert line.endswith(" 1/? loss 2.0000, 60.0% of full FLOPs")


def test_the_bar_without_the_cost_of_full_steps() -> None:
    line = shown(2, [Step(0, 2.0, full_flops=0)], force_terminal=True)
    assert line.endswith(" 1/2 loss 2.0000, 6.0 s left")


def test_nothing_is_printed_where_there_is_no_terminal() -> None:
    assert shown(5, [Step(0, 2.0), Step(1, 1.0)], force_terminal=False) == ""


def test_the_bar_is_drawn_ten_times_a_second_at_most() -> None:
    out = StringIO()
    bar = ProgressBar(
        Console(file=out, width=100, force_terminal=True, color_system=None, _environ={"TERM": "xterm"}),
        refresh_seconds=3600,
    )
    bar.on_start(0, 1000, False)
    for step in range(1000):
        bar.on_step(Step(step, float(step)))
    bar.on_end()
    drawn = re.findall(r"\d+/1000 loss", out.getvalue())
    assert {int(count.split("/")[0]) for count in drawn} == {1, 1000}


# --- TensorBoard ------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_become_scalars(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board")
    board.on_start(0, 4, False)
    board.on_selection(Chosen(0))
    for step in range(3):
        board.on_step(Step(step, 1.0 - step / 4))
    board.on_end()
    board.on_start(2, 4, True)
    for step in (2, 3):
        board.on_step(Step(step, 8.0))
    board.on_end()
    found = scalars(tmp_path / "board")
    assert found["gtflops/loss"] == [(0, 1.0), (1, 0.75), (2, 8.0), (3, 8.0)]
    assert found["gtflops/planned_flops"] == [(step, 600.0) for step in range(4)]
    assert found["gtflops/selection_seconds"] == [(0, 4.0)]
    assert set(found) == {
        *(f"gtflops/{name}" for name in ("loss", "planned_flops", "full_flops", "seconds")),
        *(f"gtflops/selection_{name}" for name in ("seconds", "budget")),
    }


def test_a_board_that_is_not_started(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected on_start before any record"):
        TensorBoard(tmp_path).on_step(Step(0, 1.0))


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install gtflops\[tensorboard\]"):
        TensorBoard(tmp_path)
