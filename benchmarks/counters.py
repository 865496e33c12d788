"""FLOP counters against what a training step executes: ``make bench-counters`` writes ``docs/counters.md``.

Each tool runs in a process of its own, because most of them patch torch while they count; what is not a dependency of
gtflops is installed into ``build/counters``, a virtual environment that sees the packages of the one that runs this and
keeps their versions.
"""

import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gtflops
from gtflops.capture.architectures import presets

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "counters.md"
ENVIRONMENT = ROOT / "build" / "counters"
#: What has to be installed for a tool, in the versions that the page is about.
INSTALLED = {
    "calflops": "calflops==0.3.2",
    "ptflops": "ptflops==0.7.5",
    "thop": "thop==0.1.1.post2209072238",
    "torchinfo": "torchinfo==1.8.0",
    "DeepSpeed": "deepspeed==0.19.8",
}
BATCH_SIZE, SEQ_LEN, IMAGE = 2, 64, 224
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Subject:
    """A model to count, and how the tensors and modules that the steps speak of are called in it."""

    config: Callable[[], Any]
    auto: Any
    queries: str | None
    adapted: list[str]
    attention: str = "eager"


def _preset(name: str) -> Callable[[], Any]:
    return lambda: transformers.AutoConfig.for_model(**presets()[name])


SUBJECTS = {
    "OPT-125m": Subject(
        _preset("facebook/opt-125m"), transformers.AutoModelForCausalLM, "*.q_proj.*", ["q_proj", "v_proj"]
    ),
    "OPT-125m, SDPA": Subject(
        _preset("facebook/opt-125m"), transformers.AutoModelForCausalLM, "*.q_proj.*", ["q_proj", "v_proj"], "sdpa"
    ),
    "Llama (SmolLM2-135M)": Subject(
        _preset("HuggingFaceTB/SmolLM2-135M"), transformers.AutoModelForCausalLM, "*.q_proj.*", ["q_proj", "v_proj"]
    ),
    "T5 (flan-t5-small)": Subject(
        _preset("google/flan-t5-small"), transformers.AutoModelForSeq2SeqLM, "*Attention.q.*", ["q", "v"]
    ),
    "BERT (base)": Subject(
        _preset("google-bert/bert-base-uncased"), transformers.AutoModelForMaskedLM, "*.query.*", ["query", "value"]
    ),
    "conv net (ResNet-50)": Subject(
        transformers.ResNetConfig, transformers.AutoModelForImageClassification, None, ["convolution"]
    ),
}
STEPS = ("full", "half-frozen", "norms only", "q only", "LoRA")


def build(subject: Subject) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model with random weights, ready to train, and a batch with labels."""
    torch.manual_seed(0)
    config = subject.config()
    model = subject.auto.from_config(config, attn_implementation=subject.attention).train()
    if hasattr(config, "num_channels"):
        images = torch.randn(BATCH_SIZE, config.num_channels, IMAGE, IMAGE)
        return model, {"pixel_values": images, "labels": torch.zeros(BATCH_SIZE, dtype=torch.int64)}
    model.config.use_cache = False
    tokens = torch.randint(4, config.vocab_size, (BATCH_SIZE, SEQ_LEN))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens
    return model, batch


def for_step(model: torch.nn.Module, subject: Subject, step: str) -> torch.nn.Module | None:
    """A copy of the model in which just what the step trains requires gradients; None where it has nothing such."""
    model = copy.deepcopy(model)
    if step == "LoRA":
        adapters = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=subject.adapted)
        return peft.get_peft_model(model, adapters)
    names = [name for name, _ in model.named_parameters()]
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }
    trained = {
        "full": names,
        "half-frozen": names[len(names) // 2 :],  # the half that is farther from the input
        "norms only": norms,
        "q only": [name for name in names if subject.queries and fnmatch(name, subject.queries)],
    }[step]
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in trained)
    return model if trained else None


class ExecutedProducts(TorchDispatchMode):
    """2 FLOPs for each multiply-add of the matrix products and convolutions that run: the yardstick.

    It shares no code with any of the counters. Operators that are not among those below and could hold a product stop
    the benchmark.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "mm" | "bmm":
                self.flops += 2 * args[0].numel() * args[1].shape[-1]
            case "addmm" | "baddbmm":
                self.flops += 2 * args[1].numel() * args[2].shape[-1]
            case "convolution":
                self.flops += 2 * result.numel() * prod(args[1].shape[1:])
            case "convolution_backward":
                asked_for = sum(args[-1][:2])  # gradients of the input and of the weight; each costs a forward pass
                self.flops += asked_for * 2 * args[0].numel() * prod(args[2].shape[1:])
            case "_scaled_dot_product_flash_attention_for_cpu":  # scores, and scores by values
                self.flops += 2 * 2 * args[0].numel() * args[1].shape[-2]
            case "_scaled_dot_product_flash_attention_for_cpu_backward":  # the scores again, and four gradients
                self.flops += 5 * 2 * args[1].numel() * args[2].shape[-2]
            case name if any(part in name for part in ("mm", "mv", "dot", "conv", "linear", "einsum", "attention")):
                raise NotImplementedError(f"the yardstick has no formula for {func}")
        return result


def run_step(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """A forward and a backward pass, for real."""
    model(**batch).loss.backward()


class ByPosition(torch.nn.Module):
    """The model for tools that know positional arguments and tensors only."""

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


#: FLOPs of a step of the model as it is, on the batch, by each tool. What a tool reports for a forward pass in
#: multiply-adds is taken twice for FLOPs, and three times for a step, which is how it is commonly used.
Counter = Callable[[torch.nn.Module, dict[str, torch.Tensor]], float]
TOOLS: dict[str, Counter] = {}
FLOPS_OF_A_MAC, PASSES = 2, 3


def tool(name: str) -> Callable[[Counter], Counter]:
    def register(count: Counter) -> Counter:
        TOOLS[name] = count
        return count

    return register


@tool("executed")
def executed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    with ExecutedProducts() as products:
        run_step(model, batch)
    return products.flops


@tool("gtflops")
def by_gtflops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    return gtflops.profile(model, batch).step_flops(model, ops="matmul").total


@tool("FlopCounterMode")
def by_flop_counter_mode(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        run_step(model, batch)
    return counter.get_total_flops()


@tool("FlopCounterMode on meta tensors")
def by_flop_counter_mode_on_meta(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    return by_flop_counter_mode(model.to("meta"), {name: tensor.to("meta") for name, tensor in batch.items()})


@tool("fvcore")
def by_fvcore(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    from fvcore.nn import FlopCountAnalysis

    inputs = without_labels(batch)
    analysis = FlopCountAnalysis(ByPosition(model, inputs), tuple(inputs.values()))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return PASSES * FLOPS_OF_A_MAC * analysis.total()


@tool("calflops")
def by_calflops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    from calflops import calculate_flops

    inputs = without_labels(batch)
    _, macs, _ = calculate_flops(
        model, kwargs=inputs, include_backPropagation=True, print_results=False, output_as_string=False
    )
    return FLOPS_OF_A_MAC * macs


@tool("ptflops")
def by_ptflops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    from ptflops import get_model_complexity_info

    inputs = without_labels(batch)
    macs, _ = get_model_complexity_info(
        model, (1,), input_constructor=lambda _: inputs, as_strings=False, print_per_layer_stat=False
    )
    if macs is None:
        raise RuntimeError("get_model_complexity_info gives None; it prints what went wrong")
    return PASSES * FLOPS_OF_A_MAC * macs


@tool("thop")
def by_thop(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    import thop

    inputs = without_labels(batch)
    macs, _ = thop.profile(ByPosition(model, inputs), tuple(inputs.values()), verbose=False)
    return PASSES * FLOPS_OF_A_MAC * macs


@tool("torchinfo")
def by_torchinfo(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    import torchinfo

    statistics = torchinfo.summary(model, input_data=without_labels(batch), verbose=0)
    return PASSES * FLOPS_OF_A_MAC * statistics.total_mult_adds


@tool("DeepSpeed")
def by_deepspeed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    from deepspeed.profiling.flops_profiler import get_model_profile

    _, macs, _ = get_model_profile(model, kwargs=without_labels(batch), print_profile=False, as_string=False, warm_up=0)
    return PASSES * FLOPS_OF_A_MAC * macs


def without_labels(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a forward pass without a loss needs."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


Cell = dict[str, Any]


def measure(name: str) -> list[Cell]:
    """The tool's count of every step of every model, with the processor seconds that it took, or why it failed."""
    torch.set_num_threads(1)
    cells = []
    for label, subject in SUBJECTS.items():
        whole, batch = build(subject)
        for step in STEPS:
            model = for_step(whole, subject, step)
            if model is None:
                continue
            cell: Cell = {"model": label, "step": step}
            before = time.process_time()
            try:
                cell["flops"] = round(TOOLS[name](model, dict(batch)))
            except Exception as error:
                cell["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            cell["seconds"] = time.process_time() - before
            cells.append(cell)
    return cells


# --- installing and running -------------------------------------------------------------------------------------


def install() -> dict[str, str]:
    """Make ``build/counters``; why a tool could not be installed, for those that could not."""
    if not ENVIRONMENT.is_dir():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        packages = next(ENVIRONMENT.glob("lib/python*/site-packages"))
        outer = [path for path in sys.path if path.endswith("site-packages")]
        # addsitedir, because an editable gtflops is found by a .pth file of its own.
        (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in outer))
    problems = {}
    for name, requirement in INSTALLED.items():
        command = [_python(name), "-m", "pip", "install", "--quiet", "--no-build-isolation"]
        command += ["--constraint", str(ROOT / "constraints.txt"), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            problems[name] = f"does not install: {done.stderr.strip().splitlines()[-1]}"
    return problems


def _python(name: str) -> str:
    return str(ENVIRONMENT / "bin" / "python") if name in INSTALLED else sys.executable


def run_tool(name: str) -> tuple[list[Cell], str]:
    """The tool's cells, and why there are none."""
    output = ENVIRONMENT / f"{name.replace(' ', '-')}.json"
    output.unlink(missing_ok=True)
    command = [_python(name), __file__, name, str(output)]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode != 0:
        return [], f"ends with code {done.returncode}: `{done.stderr.strip().splitlines()[-1]}`"
    return json.loads(output.read_text()), ""


# --- the page ---------------------------------------------------------------------------------------------------

HEAD = """# Counters against executed steps

`make bench-counters` wrote this page on {date}: {versions}; Linux, CPU, float32, one thread. Batches of {batch} x
{length} tokens, or {batch} images of {image} x {image}; random weights; attention is eager unless it says SDPA. What
each tool looks at, and what it leaves out, is on the page [Conventions of other counters](conventions.md).

A step is a forward and a backward pass. *Full*: everything is trained. *Half-frozen*: the first half of the tensors,
from the input on, is frozen. *Norms only*, *q only*: just the normalisation layers, the query projections. *LoRA*: r
= 8 on queries and values, or on all convolutions. *Executed* is what PyTorch really ran in matrix products and
convolutions, 2 FLOPs for a multiply-add, by a yardstick of 30 lines in `benchmarks/counters.py` that shares no code
with any tool. gtflops predicts a step from a trace; FlopCounterMode counts one that runs. fvcore, calflops, ptflops,
thop, torchinfo and DeepSpeed's profiler count the multiply-adds of a forward pass; a step is taken as three of them,
as calflops has it.

## Errors

Each tool's count of the step, less what was executed, in percent of it. `0` is equal to the FLOP.

"""

TIMES = """
## Times

Processor seconds until a tool has answered for the full step, and for all steps that it answers for. Each is asked anew
for every step. gtflops would need two traces for them all: one profile answers for every step but LoRA.

"""


@cache
def _versions() -> str:
    packages = ("gtflops", "torch", "transformers", "peft", "fvcore")
    return ", ".join(f"{package} {version(package)}" for package in packages)


def page(cells: Mapping[str, list[Cell]], problems: Mapping[str, str]) -> str:
    """The Markdown of ``docs/counters.md``."""
    found = {(name, cell["model"], cell["step"]): cell for name, own in cells.items() for cell in own}
    tools = [name for name in TOOLS if name != "executed"]
    failures: dict[tuple[str, str], dict[str, list[str]]] = {(name, why): {} for name, why in problems.items()}
    text = HEAD.format(
        date=datetime.now(UTC).date(),
        versions=", ".join([_versions(), *(requirement.replace("==", " ") for requirement in INSTALLED.values())]),
        batch=BATCH_SIZE,
        length=SEQ_LEN,
        image=IMAGE,
    )
    text += _row(["model", "step", "executed, GFLOP", *tools]) + _row(["---"] * 2 + ["---:"] * (1 + len(tools)))
    for label in SUBJECTS:
        for number, step in enumerate(STEPS):
            truth = found.get(("executed", label, step))
            if truth is None:
                continue
            row = [label if number == 0 else "", step, f"{truth['flops'] / 1e9:,.2f}"]
            for name in tools:
                cell = found.get((name, label, step), {})
                if "error" in cell:
                    failures.setdefault((name, f"`{cell['error']}`"), {}).setdefault(label, []).append(step)
                row.append(_error(cell.get("flops"), truth["flops"]))
            text += _row(row)
    text += "\n## What fails\n\n" + ("".join(map(_failure, failures.items())) or "Nothing did.\n")
    text += TIMES + _row(["tool", *SUBJECTS]) + _row(["---"] + ["---:"] * len(SUBJECTS))
    for name in tools:
        row = [name]
        for label in SUBJECTS:
            own = [cell for step in STEPS if "flops" in (cell := found.get((name, label, step), {}))]
            row.append(f"{own[0]['seconds']:.1f} s; {sum(cell['seconds'] for cell in own):.1f} s" if own else "fails")
        text += _row(row)
    return text


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _failure(failure: tuple[tuple[str, str], Mapping[str, list[str]]]) -> str:
    (name, why), where = failure
    cells = "; ".join(f"{label}: {', '.join(steps)}" for label, steps in where.items())
    return f"- {name}: {why}{cells and ', on '}{cells}\n"


def _error(flops: int | None, truth: int) -> str:
    if flops is None:
        return "fails"
    if flops == truth:
        return "0"
    return f"{100 * (flops - truth) / truth:+.2f}"


def main() -> None:
    if len(sys.argv) == 3:  # in the process of one tool
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        Path(sys.argv[2]).write_text(json.dumps(measure(sys.argv[1])))
        return
    problems = install()
    cells: dict[str, list[Cell]] = {}
    for name in TOOLS:
        if name not in problems:
            print(name, flush=True)
            cells[name], problem = run_tool(name)
            if problem:
                problems[name] = problem
    PAGE.write_text(page(cells, problems))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
