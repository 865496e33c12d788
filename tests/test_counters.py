"""``benchmarks/counters.py`` on a small model, with the counters that need no package of their own."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from small_models import CONFIGS

HERE = ["executed", "gtflops", "FlopCounterMode", "FlopCounterMode on meta tensors", "fvcore"]


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with one small model in the place of the published ones."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import counters

    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    small = counters.Subject(lambda: config, transformers.AutoModelForCausalLM, "*.q_proj.*", ["q_proj", "v_proj"])
    monkeypatch.setattr(counters, "SUBJECTS", {"small Llama": small})
    monkeypatch.setattr(counters, "SEQ_LEN", 8)
    return counters


def test_small_steps_are_counted_and_laid_out(counters: ModuleType) -> None:
    threads = torch.get_num_threads()
    cells = {name: counters.measure(name) for name in HERE}
    torch.set_num_threads(threads)
    by_step = {name: {cell["step"]: cell.get("flops") for cell in own} for name, own in cells.items()}
    assert list(by_step["executed"]) == list(counters.STEPS)
    full = by_step["executed"]["full"]
    assert full > max(flops for step, flops in by_step["executed"].items() if step != "full")
    assert by_step["gtflops"] == by_step["FlopCounterMode"] == by_step["executed"]
    assert set(by_step["fvcore"].values()) >= {full}, "three forward passes, whatever is trained"

    page = counters.page(cells, {"thop": "does not install: no network"})
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        for part in page.split("\n## ")
    ]
    errors, times = tables[1], tables[3]
    assert errors[0][:5] == ["model", "step", "executed, GFLOP", "gtflops", "FlopCounterMode"]
    assert [row[1] for row in errors[2:]] == list(counters.STEPS)
    assert {tuple(row[3:5]) for row in errors[2:]} == {("0", "0")}
    assert errors[2][errors[0].index("fvcore")] == "0"
    assert errors[3][errors[0].index("fvcore")].startswith("+")
    assert errors[2][errors[0].index("thop")] == "fails"
    assert "- thop: does not install: no network\n" in page
    assert [row[0] for row in times[2:]] == [name for name in counters.TOOLS if name != "executed"]
    assert times[2][1].count(" s") == 2


def test_what_a_tool_fails_on_is_named(counters: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("no such layer\nand more")

    monkeypatch.setitem(counters.TOOLS, "gtflops", fail)
    monkeypatch.setattr(counters, "STEPS", ("full", "LoRA"))
    threads = torch.get_num_threads()
    cells = {name: counters.measure(name) for name in ("executed", "gtflops")}
    torch.set_num_threads(threads)
    assert "- gtflops: `RuntimeError: no such layer`, on small Llama: full, LoRA\n" in counters.page(cells, {})
