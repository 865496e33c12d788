"""Runs that end badly, and go on: killed, interrupted, out of room, with damaged or foreign checkpoints."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gtflops
import resumable_run
from gtflops.training import checkpoints

SCRIPT = Path(resumable_run.__file__)


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(process: "subprocess.Popen[str]") -> str:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the run prints at its end."""
    return last_line(start(tmp_path_factory.mktemp("uninterrupted")))


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_bit(tmp_path: Path, uninterrupted: str) -> None:
    """Killed at 20 random moments of one run, while it builds, steps, measures, writes or removes checkpoints."""
    printed, errors = start(tmp_path, "--kills", "20").communicate(timeout=500)
    lines = printed.split("\n")
    assert lines.count("killed") == 20, errors
    assert sum(line.startswith("step") for line in lines) > resumable_run.STEPS, "steps were lost, and made again"
    assert lines[-2] == uninterrupted, errors
    assert len(list(tmp_path.iterdir())) == checkpoints.KEPT


@pytest.mark.slow
def test_ctrl_c_saves_and_ends(tmp_path: Path, uninterrupted: str) -> None:
    process = start(tmp_path, "--slow", "0.05")
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert last_line(process).startswith("stopped ")
    assert last_line(start(tmp_path, "--resume")) == uninterrupted


def test_ctrl_c_without_checkpoints_is_an_exception_between_steps() -> None:
    trainer = resumable_run.trainer()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(resumable_run.loader(), on_step=lambda _: signal.raise_signal(signal.SIGINT))
    assert trainer.log.stopped == "interrupted after 1 steps"
    assert all(tensor.grad is None for tensor in trainer.model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler


# --- what goes wrong while writing ------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = resumable_run.trainer()
    batches = list(resumable_run.loader())
    trainer.fit(batches[:3], checkpoints=tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_bring_to_disk", full)
    with pytest.raises(gtflops.SavedFileError, match=r"No space left on device; the checkpoints before it are"):
        trainer.fit(batches[3:5], checkpoints=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(gtflops.SavedFileError, match="cannot write the checkpoint"):
        resumable_run.trainer().fit(list(resumable_run.loader())[:1], checkpoints=tmp_path / "file")


@pytest.mark.parametrize("what", ["nan", "refused"])
def test_a_step_that_fails_leaves_weights_and_checkpoint(tmp_path: Path, what: str) -> None:
    batches: list[Any] = list(resumable_run.loader())[:4]
    trainer = resumable_run.trainer()
    trainer.fit(batches[:2], checkpoints=tmp_path)
    log = len(trainer.log.steps)
    if what == "nan":
        trainer.loss = lambda outputs, _: outputs.loss * float("nan")
    else:
        batches[2] = {**batches[2], "input_ids": batches[2]["input_ids"] + 97}
    with pytest.raises(gtflops.GtflopsError, match="weights are those of the step before"):
        trainer.fit(batches[2:3], checkpoints=tmp_path)
    assert len(trainer.log.steps) == log
    resumed = resumable_run.trainer()
    checkpoints.read_last(tmp_path, resumed.model)
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(dict(resumed.model.named_parameters())[name], tensor), name


# --- what is wrong when reading ---------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    resumable_run.trainer().fit(list(resumable_run.loader())[:2], checkpoints=tmp_path, checkpoint_every=1)
    return tmp_path


def resumed(folder: Path) -> gtflops.GreenTrainer:
    trainer = resumable_run.trainer()
    before = resumable_run.digest(trainer)
    try:
        trainer.fit(list(resumable_run.loader()), checkpoints=folder, resume=True)
    except gtflops.GtflopsError:
        assert resumable_run.digest(trainer) == before
        raise
    return trainer


@pytest.mark.parametrize("name", ["model.safetensors", "states.pt", "progress.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_refused(written: Path, name: str, damage: str) -> None:
    last = max(written.iterdir())
    content = bytearray((last / name).read_bytes())
    if damage == "missing":
        (last / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (last / name).write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(gtflops.SavedFileError, match=r"is damaged: .*; remove it to resume from step-0+1"):
        resumed(written)


def test_a_checkpoint_of_another_model(written: Path) -> None:
    other = torch.nn.Linear(2, 2)
    with pytest.raises(gtflops.InputError, match=r"is of another model: \d+ tensors differ, first"):
        checkpoints.read_last(written, other)


def test_a_checkpoint_that_holds_code_does_not_run_it(written: Path) -> None:
    """Even with digests that fit: what is not plain data and tensors is refused by ``weights_only``."""
    assert torch.load(max(written.iterdir()) / "states.pt", weights_only=True).keys() >= {"optimizer", "random"}


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(gtflops.InputError, match="holds no checkpoint"):
        resumed(tmp_path)
    with pytest.raises(gtflops.InputError, match="resume=True without checkpoints"):
        resumable_run.trainer().fit([], resume=True)
