"""The commands that print costs, as a user runs them: every line of them, units, wishes, errors, exit codes."""

import contextlib
import json
import os
import pty
import re
import shlex
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
from small_tokenizer import save_llama


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
    """A small Llama with weights in a folder ``tiny``, ``tiny.json``, its profile, and ``pairs.jsonl`` to train on."""
    folder = tmp_path_factory.mktemp("costs")
    save_llama(folder / "tiny")
    rows = [{"prompt": "what it costs " * (1 + index % 3), "target": "a model learns"} for index in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
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


PRINTED = sorted((Path(__file__).parent / "printed").glob("*.txt"))


@pytest.mark.parametrize("path", PRINTED, ids=lambda path: path.stem)
def test_what_is_printed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file begins with the command that prints the rest of it, at 100 columns."""
    monkeypatch.chdir(folder)
    command, _, expected = path.read_text().partition("\n")
    prompt, program, *arguments = shlex.split(command)
    assert (prompt, program) == ("$", "gtflops")
    result = run(*arguments)
    assert "".join(f"{line.rstrip()}\n" for line in result.stdout.splitlines()) == expected
    assert result.stderr == ""  # progress is for terminals


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "Leaves with 0 when all is done"),
        (
            {"_GTFLOPS_COMPLETE": "complete_bash", "COMP_WORDS": "gtflops profile openai", "COMP_CWORD": "2"},
            "openai-community/gpt2",
        ),
    ],
    ids=["help", "completion"],
)
def test_it_needs_no_torch(environment: dict[str, str], expected: str) -> None:
    code = (
        "import sys\nfrom gtflops.cli import main\nsys.argv[1:] = ['--help']\ntry:\n    main()\n"
        "except SystemExit as left:\n    print('\\n', left.code, *sorted(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    ).stdout
    code_and_modules = printed.splitlines()[-1].split()
    assert code_and_modules[0] == "0"
    assert "gtflops.cli" in code_and_modules
    assert not {"torch", "transformers", "numpy", "plotly"} & set(code_and_modules)
    assert expected in printed


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("gtflops pro", 1, ["profile"]),
        ("gtflops profile --tr", 2, ["--trainable"]),
        ("gtflops profile --unit ", 3, ["flops", "macs"]),
        ("gtflops profile facebook/opt-1", 2, ["facebook/opt-125m", "facebook/opt-1.3b", "facebook/opt-13b"]),
        ("gtflops verify google-b", 2, ["google-bert/bert-base-uncased"]),
        ("gtflops ops --model google-b", 3, ["google-bert/bert-base-uncased"]),
        ("gtflops select tiny", 2, []),  # a shell then proposes files
        ("gtflops compare smol", 2, ["smollm2"]),
    ],
)
def test_completion(words: str, position: int, expected: list[str]) -> None:
    asked = {"_GTFLOPS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    assert run(**asked).stdout.split() == expected
    # Typer looks for the shell among the processes above this one, of which there may be none.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_GTFLOPS_COMPLETE=complete_bash" in run("--show-completion", "bash", **named).stdout


def test_a_command_that_cannot_be_read_is_one_line() -> None:
    for arguments, expected in (
        (["profile", "opt", "--attentn", "sdpa"], "error: No such option: --attentn"),
        (["frontier"], "(gtflops frontier --help says what there is)"),
        (["profil"], "(gtflops --help says what there is)"),
        (["profile", "opt", "--top", "-1"], "error: Invalid value for '--top': "),
    ):
        refused = run(*arguments, expect=2)
        assert expected in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert refused.stdout == ""
    assert "Usage: gtflops" in run(expect=2).stdout  # nothing was asked for


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyError("seq"), 1, "error: KeyError 'seq'; gtflops did not expect this: --debug shows where\n"),
        (OSError(28, "No space left on device"), 2, "error: OSError [Errno 28] No space left on device\n"),
        (gtflops.InputError("two\nlines"), 2, "error: InputError two lines\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_and_exit_codes(
    error: BaseException,
    code: int,
    expected: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(gtflops.Profile, "load", fail)
    monkeypatch.setattr(sys, "argv", ["gtflops", "profile", str(saved)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code
    assert capfd.readouterr().err == expected
    if code in (1, 2) and not isinstance(error, BrokenPipeError):
        monkeypatch.setenv("GTFLOPS_DEBUG", "1")
        with pytest.raises(type(error)):
            main()


def test_a_reader_that_has_seen_enough() -> None:
    """Such as head: no traceback, no complaint of Python's."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gtflops", "ops", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """What a person sees, colours included."""
    ours, theirs = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gtflops", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.wait() in (0, 2)
    return seen.decode()


def test_colours_are_for_terminals_that_want_them(saved: Path) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    refused = ["select", saved, "--importance", "numel", "--budget", "2"]
    assert coloured.search(on_a_terminal(*refused))
    assert not coloured.search(on_a_terminal(*refused, NO_COLOR="1"))
    assert "\x1b[" not in on_a_terminal(*refused, TERM="dumb")
    assert "\x1b[" not in run("profile", saved).stdout
    assert "selecting" in on_a_terminal(*refused)  # progress


def test_the_width_is_that_of_the_terminal_or_none(saved: Path, profile: gtflops.Profile) -> None:
    narrow = run("profile", saved, COLUMNS="40").stdout
    assert max(map(len, narrow.splitlines())) <= 40
    assert re.search(r" 100\.0%", narrow)  # numbers stay whole
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "gtflops", "profile", str(saved)]
    piped = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True).stdout
    assert any(profile.names[0] in line and "FLOP" in line for line in piped.splitlines())
    assert any("note: " in line and len(line) > 100 for line in piped.splitlines())


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
