"""A run goes on with what it was begun with, or says what is other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gtflops
from gtflops.recipes.datasets import DataSet, Example
from gtflops.recipes.finetune import FineTuneResult, FineTuneSettings, finetune
from gtflops.recipes.resuming import digest_of_weights
from gtflops.training import CarbonAware, Total
from small_models import build
from small_tokenizer import word_tokenizer

EXAMPLES = tuple(Example("what it costs " * (1 + index % 3), " TL;DR:", "a model learns") for index in range(8))
DATA = DataSet("words", EXAMPLES, EXAMPLES[:2], (), 16, 4, "rouge")
SETTINGS = FineTuneSettings(steps=4, batch_size=2, seq_len=16, target_len=4, every=2, budget=0.7, learning_rate=1e-2)


def model(seed: int = 0, family: str = "llama") -> Any:
    torch.manual_seed(seed)
    return build(family)


def go_on(
    folder: Path, settings: FineTuneSettings = SETTINGS, *, of: Any = None, data: DataSet = DATA
) -> FineTuneResult:
    return finetune(of or model(), word_tokenizer(), data, settings, checkpoints=folder, resume=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FineTuneResult]:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, finetune(model(), word_tokenizer(), DATA, SETTINGS, checkpoints=folder, checkpoint_every=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "lora"}, "--scheme was greentrainer and is lora"),
        ({"budget": 0.6}, "--budget was 0.7 and is 0.6"),
        ({"budget": [0.7, 0.6]}, r"--budget was 0.7 and is \[0.7, 0.6\]"),
        ({"budget": Total(hours=2)}, r"--budget was 0.7 and is Total\(hours=2\)"),
        ({"budget": CarbonAware(100.0, {0: 0.7})}, r"--budget was 0.7 and is CarbonAware\("),
        ({"batch_size": 1}, "--batch-size was 2 and is 1"),
        ({"accumulate": 2}, "--accumulate was 1 and is 2"),
        ({"learning_rate": 2e-2}, "--learning-rate was 0.01 and is 0.02"),
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"steps": 8}, "--steps was 4 and is 8"),
        ({"every": "epoch"}, "--every was 2 and is epoch"),
        ({"seq_len": 15}, "--seq-len was 16 and is 15"),
        ({"must_freeze": ("lm_*",)}, r"--must-freeze was \(\) and is \('lm_\*',\)"),
        ({"seed": 1, "every": 1}, "--every was 2 and is 1; --seed was 0 and is 1; expected them as they were"),
    ],
)
def test_other_settings_are_named(begun: tuple[Path, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(gtflops.InputError, match=message):
        go_on(begun[0], replace(SETTINGS, **change))


def test_another_model_and_other_data_are_named(begun: tuple[Path, Any]) -> None:
    folder = begun[0]
    here, there = digest_of_weights(model()), digest_of_weights(model(1))
    with pytest.raises(gtflops.InputError, match=f"--model was LlamaForCausalLM with weights {here} and is .* {there}"):
        go_on(folder, of=model(1))
    with pytest.raises(gtflops.InputError, match=r"--model was LlamaForCausalLM .* and is OPTForCausalLM"):
        go_on(folder, of=model(family="opt"))
    for train in (EXAMPLES[:6], (*EXAMPLES[1:], EXAMPLES[0])):
        with pytest.raises(gtflops.InputError, match=f"--data was 8 training examples .* and is {len(train)} "):
            go_on(folder, data=replace(DATA, train=train))


def test_what_no_step_depends_on_may_be_other(begun: tuple[Path, FineTuneResult]) -> None:
    """Nor where the data lies, under which name, and what is measured on."""
    folder, whole = begun
    settings = replace(SETTINGS, num_quality=1, num_validation=1, count_executed=True, allow_unsupported=True)
    data = replace(DATA, name="moved", train=tuple(replace(one, where="elsewhere") for one in EXAMPLES))
    resumed = go_on(folder, settings, data=data)
    assert [step.loss for step in resumed.log.steps] == [step.loss for step in whole.log.steps]
    assert set(resumed.quality) == {"rouge1", "rouge2", "rougeL"}


def test_an_adapter_is_no_other_model(tmp_path: Path) -> None:
    """The weights are those of the model as it came, also where a scheme wraps it; and a budget is nothing to it."""
    settings = replace(SETTINGS, scheme="lora", steps=2)
    finetune(model(), word_tokenizer(), DATA, settings, checkpoints=tmp_path)
    assert len(go_on(tmp_path, replace(settings, budget=0.6)).log.steps) == 2


def damage(change: Callable[[Path], Any], folder: Path) -> str:
    file = folder / "begun-with.json"
    before = file.read_bytes()
    change(file)
    with pytest.raises(gtflops.GtflopsError) as error:
        go_on(folder)
    file.write_bytes(before)
    return str(error.value)


def test_a_folder_that_does_not_say(begun: tuple[Path, Any], tmp_path: Path) -> None:
    assert "holds no begun-with.json" in damage(Path.unlink, begun[0])
    for text in ("{", "[]"):
        assert "is damaged" in damage(lambda file, text=text: file.write_text(text), begun[0])  # type: ignore[misc]
    lacks = json.loads((begun[0] / "begun-with.json").read_text())
    del lacks["--seed"]
    assert "--seed was not there and is 0" in damage(lambda file: file.write_text(json.dumps(lacks)), begun[0])
    with pytest.raises(gtflops.InputError, match="expected the folder that 'gtflops train --checkpoints' wrote"):
        go_on(tmp_path)
    with pytest.raises(gtflops.InputError, match="has step-000000004 of another run; expected an empty folder"):
        finetune(model(), word_tokenizer(), DATA, SETTINGS, checkpoints=begun[0])
