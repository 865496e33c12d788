"""The commands that print costs, as a user runs them: every line of them, units, wishes, errors, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gtflops
from gtflops.cli import main
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


def test_what_it_costs_to_train_just_these(saved: Path, profile: gtflops.Profile) -> None:
    names = [name for name in profile.names if "q_proj" in name or name.endswith("norm.weight")]
    command = ["profile", saved, "--trainable", "*.q_proj.*", "--trainable", "*norm.weight"]
    told = json.loads(run(*command, "--json").stdout)
    assert set(told["trained"]) == set(names)
    step = profile.step_flops(names)
    assert told["flops"]["total"] == {"all": step.total, "matmul": profile.step_flops(names, ops="matmul").total}
    assert told["full"]["total"]["all"] == profile.full_flops
    printed = run(*command).stdout
    assert "a step that trains *.q_proj.*, *norm.weight" in printed
    assert f"{step.total:,} of {profile.full_flops:,} FLOP; trained {len(names)} tensors" in printed
    assert f"{step.total / profile.full_flops:.1%}" in printed
    in_macs = run(*command, "--unit", "macs").stdout
    assert f" MAC; trained {len(names)} tensors" in in_macs
    assert "FLOP" not in in_macs


def test_what_adapters_cost_is_what_a_step_with_them_executes(folder: Path, profile: gtflops.Profile) -> None:
    """Held against PyTorch's own counter, in a real step of PEFT's model."""
    sizes = ["--batch-size", "2", "--seq-len", "16"]
    arguments = [*sizes, "--trainable", "lora:r=4,q_proj,v_proj", "--json"]
    told = json.loads(run("profile", folder / "tiny", *arguments).stdout)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    ids = torch.zeros((2, 16), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert told["flops"]["total"]["matmul"] == counter.get_total_flops()
    assert set(told["trained"]) == {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert told["full"]["total"]["all"] == profile.full_flops


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["*.q_prj.*"], "no tensor matches --trainable='*.q_prj.*'; nearest names: model.layers."),
        (["lora:r=8,q_prj"], "no module of LlamaForCausalLM is called 'q_prj'"),
        (["lora:r=8,q_prj"], "nearest: q_proj"),
        (["lora:r=8"], "it names no modules; expected 'lora:' and names of modules"),
        (["lora:rank=8,q_proj"], "there is no setting 'rank'"),
        (["lora:r=0,q_proj"], "r is below 1"),
        (["lora:r=high,q_proj"], "invalid literal"),
        (["lora:r=8,self_attn"], "PEFT puts no adapter on self_attn"),
        (["lora:r=8,q_proj", "*.bias"], "expected adapters alone, described once"),
    ],
)
def test_wishes_that_cannot_be_met(
    folder: Path,
    wishes: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [word for wish in wishes for word in ("--trainable", wish)]
    sizes = ["--batch-size", "1", "--seq-len", "4"]
    monkeypatch.setattr(sys, "argv", ["gtflops", "profile", str(folder / "tiny"), *sizes, *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_adapters_need_a_model_and_peft(folder: Path, saved: Path, tmp_path: Path) -> None:
    assert "holds no model to put adapters on" in run("profile", saved, "--trainable", "lora:q_proj", expect=2).stderr
    (tmp_path / "peft.py").write_text("raise ImportError('absent')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    missing = run("profile", folder / "tiny", "--seq-len", "4", "--trainable", "lora:q_proj", expect=2, PYTHONPATH=path)
    assert "peft, which is not installed; pip install 'gtflops[recipes]'" in missing.stderr
