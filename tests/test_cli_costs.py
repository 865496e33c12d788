"""The commands that print costs, as a user runs them: every line of them, units, wishes, errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gtflops
from small_models import build


def run(*arguments: str | Path, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    result = subprocess.run(
        [sys.executable, "-m", "gtflops", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**inherited, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert result.returncode == expect, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small Llama in a folder ``tiny``, and ``tiny.json``, its profile."""
    folder = tmp_path_factory.mktemp("costs")
    build("llama").config.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gtflops.profile("tiny", batch_size=2, seq_len=16).save("tiny.json")
    return folder


@pytest.fixture
def saved(folder: Path) -> Path:
    return folder / "tiny.json"


@pytest.fixture(scope="module")
def profile(folder: Path) -> gtflops.Profile:
    return gtflops.Profile.load(folder / "tiny.json")


def test_costs_in_macs_are_half(saved: Path, profile: gtflops.Profile) -> None:
    def exact(unit: str, *command: str | Path) -> str:
        return run(*command, "--unit", unit).stdout

    by_mac, by_flop = (exact(unit, "profile", saved) for unit in ("macs", "flops"))
    assert f"{profile.full_flops // 2:,}{'.5' * (profile.full_flops % 2)} MAC; " in by_mac
    assert f"{profile.full_flops:,} FLOP; " in by_flop
    assert "FLOP" not in by_mac
    for command in (["select", saved, "--importance", "numel"], ["frontier", saved, "--importance", "numel"]):
        assert "FLOP" not in exact("macs", *command)
        assert "MAC" in exact("macs", *command)
    assert " MMAC " in exact("macs", "ops", "--model", saved)
    selected = json.loads(run("select", saved, "--importance", "numel", "--json").stdout)["flops"]
    assert f"{selected // 2:,}" in exact("macs", "select", saved, "--importance", "numel")
    for command in (["profile", saved], ["ops", "--model", saved], ["select", saved, "--importance", "numel"]):
        assert "leave --unit macs out" in run(*command, "--unit", "macs", "--json", expect=2).stderr


def test_a_budget_in_flops(saved: Path, profile: gtflops.Profile, tmp_path: Path) -> None:
    full = profile.full_flops
    importance = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    limit = int(0.7 * full) // 2 * 2
    expected = gtflops.select(profile, importance, budget_flops=limit)
    command = ["select", saved, "--importance", "numel", "--json", "--budget"]
    for written in (f"{limit} FLOP", f"{limit / 2e6} MMACs", f"{limit // 2}mac"):
        assert json.loads(run(*command, written).stdout) == expected.to_json()
    report = ["report", saved, "--importance", "numel", "-o", tmp_path / "report.json", "--budget", f"{limit} FLOP"]
    run(*report)
    assert json.loads((tmp_path / "report.json").read_text())["selection"]["budget_flops"] == limit
    for written in ("half", "1.2 TFLIP", "-1", "1.2.3", "9" * 400):
        refused = run(*command[:-1], f"--budget={written}", expect=2).stderr
        assert f"--budget is '{written}', expected a share of a full step, such as 0.5, or" in refused
    assert "given with cost='flops', expected cost='time'" in run(*command, "35 ms", expect=2).stderr
