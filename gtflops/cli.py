"""The command line: parse, call, print."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gtflops.errors import GtflopsError, InputError
from gtflops.operators import Entry, Kind

if TYPE_CHECKING:
    from gtflops.profiling import Profile
    from gtflops.recipes.demo import Demo
    from gtflops.recipes.finetune import FineTuneResult
    from gtflops.selection import Selection

app = typer.Typer(
    help="What a training step costs, exactly; which tensors are worth training under a FLOPs budget; train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
#: Set in the environment by --debug, or by the user.
DEBUG = "GTFLOPS_DEBUG"

out = Console()
err = Console(stderr=True)


class Attention(StrEnum):
    """How a model that is built by name computes attention."""

    EAGER = "eager"
    SDPA = "sdpa"


class FormOption(StrEnum):
    """How a selection is charged."""

    GRAPH = "graph"
    CHAIN = "chain"


class GranularityOption(StrEnum):
    """What is chosen as a whole."""

    TENSOR = "tensor"
    LAYER = "layer"


Model = Annotated[
    str,
    typer.Argument(help="A saved profile (.json), a local folder, a preset, or a Hugging Face id.", show_default=False),
]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a batch; 4 unless given.", min=1)]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens in a sequence; 512 unless given. Classifiers of images have none.", min=1)
]
DecoderLen = Annotated[
    int | None, typer.Option(help="Tokens of an encoder-decoder's labels; as many as --seq-len unless given.", min=1)
]
AttentionOption = Annotated[
    Attention | None, typer.Option(help="Attention of a model built by name: eager unless given.")
]
AllowUnsupported = Annotated[bool, typer.Option(help="Count operators without a price as free.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Html = Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.", dir_okay=False)]
Budget = Annotated[float, typer.Option(help="Share of a full step's FLOPs that a step may cost, in (0, 1].")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.", min=1)]
Every = Annotated[int, typer.Option(help="Optimizer steps between two selections.", min=1)]


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"gtflops {version('gtflops')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


@app.command("profile")
def profile_command(
    model: Model,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    save: Annotated[Path | None, typer.Option(help="Write the profile here, for select and later reports.")] = None,
    html: Html = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Price what torch.compile would run as well, beside the eager step.")
    ] = False,
    as_json: AsJson = False,
    top: Annotated[int, typer.Option(help="How many tensors to list.", min=0)] = 10,
) -> None:
    """What one training step costs, and where.

    Example: gtflops profile facebook/opt-2.7b --batch-size 4 --seq-len 512 --html opt.html
    """
    from gtflops.report.summary import summarise
    from gtflops.report.terminal import profile_tables

    _require_writable(html, ".html")
    _require_writable(save)
    costs = _profile(model, batch_size, seq_len, decoder_len, attention, compiled=compiled)
    if save is not None:
        costs.save(save)
    if html is not None:
        _write_html(html, costs)
    if as_json:
        _print_json(summarise(costs).to_json())
    else:
        out.print(profile_tables(costs, top=top))
    _say_written(save, html)


@app.command("verify")
def verify_command(
    model: Annotated[str, typer.Argument(help="A local folder, a preset, or a Hugging Face id.", show_default=False)],
    selections: Annotated[int, typer.Option(help="Random selections, besides none, all, first and last.", min=0)] = 5,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    seed: Annotated[int, typer.Option(help="Of the random selections.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Hold the prediction against what PyTorch executes, and against other counters.

    Steps run without weights and compute nothing. Leaves with 1 where a step was not what was predicted.

    Example: gtflops verify facebook/opt-125m --batch-size 2 --seq-len 128 --selections 10
    """
    from gtflops.capture import architecture
    from gtflops.report.terminal import verification_tables

    if _is_saved(model):
        raise InputError(
            f"{model} is a saved profile, which holds no model to run; expected a folder, a preset or an id"
        )
    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    built = architecture(model, **_sizes(model, batch_size, seq_len, decoder_len, attention))
    with err.status("running real steps"):
        found = costs.verify(built.model, built.batch, selections=selections, seed=seed)
    if as_json:
        _print_json(found.to_json())
    else:
        out.print(verification_tables(costs, found))
    if not found.exact:
        raise typer.Exit(1)


@app.command("select")
def select_command(
    model: Model,
    importance: Annotated[
        str,
        typer.Option(
            help="A JSON file with a number for each tensor, such as 'train' writes; or 'numel', each tensor's "
            "number of elements, which is a stand-in and no measurement.",
            show_default=False,
        ),
    ],
    budget: Budget = 0.5,
    form: Annotated[
        FormOption, typer.Option(help="Charge what a step executes, or the chain form's upper bound of it.")
    ] = FormOption.GRAPH,
    granularity: Annotated[
        GranularityOption, typer.Option(help="Choose single tensors, or layers as a whole (for torch.compile).")
    ] = GranularityOption.TENSOR,
    must_train: Annotated[
        list[str] | None, typer.Option(help="Train the tensors of such names in any case, as '*.bias'; repeatable.")
    ] = None,
    must_freeze: Annotated[
        list[str] | None, typer.Option(help="Train no tensors of such names, as 'model.embed*'; repeatable.")
    ] = None,
    max_elements: Annotated[
        int | None, typer.Option(help="Elements that all trained tensors may have together.", min=1)
    ] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    allow_unsupported: AllowUnsupported = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Which tensors to train within a budget.

    Example: gtflops select opt.profile.json --importance importance.json --budget 0.5 --must-freeze '*embed*'
    """
    from gtflops.report.terminal import selection_table
    from gtflops.selection import select

    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    values = (
        {tensor.name: float(tensor.numel) for tensor in costs.tensors} if importance == "numel" else _read(importance)
    )
    selection = select(
        costs,
        values,
        budget,
        form=form.value,
        granularity=granularity.value,
        must_train=must_train or (),
        must_freeze=must_freeze or (),
        max_elements=max_elements,
        allow_unsupported=allow_unsupported,
    )
    if html is not None:
        _write_html(html, costs, selection)
    if as_json:
        _print_json(selection.to_json())
    else:
        out.print(selection_table(selection))
        if importance == "numel":
            out.print("Importance: number of elements of each tensor, a stand-in and no measurement.")
    _say_written(html)


@app.command("ops")
def ops_command(
    model: Annotated[
        str | None, typer.Option(help="List what this model uses: a saved profile, a folder, a preset or an id.")
    ] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    kind: Annotated[Kind | None, typer.Option(help="Only operators of this class.")] = None,
    as_json: AsJson = False,
) -> None:
    """The operators that have a price, their formulas and where these are from; or what a model uses of them.

    Example: gtflops ops --model facebook/opt-125m --seq-len 128
    """
    from gtflops.operators import TABLE
    from gtflops.report.summary import summarise
    from gtflops.report.terminal import operators_table, used_operators_table

    if model is None:
        entries = [entry for entry in TABLE if kind in (None, entry.kind)]
        if as_json:
            _print_json([_entry_json(entry) for entry in entries])
        else:
            _print_wide(operators_table(entries))
        return
    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    if as_json:
        operators = summarise(costs).to_json()["operators"]
        _print_json([row for row in operators if row["kind"] is None or kind in (None, row["kind"])])
    else:
        _print_wide(used_operators_table(costs, kind))


@app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(help="'smollm2', a local folder, or a Hugging Face id, with weights.")],
    data: Annotated[str, typer.Option(help="'aclsum', or a JSON-lines file with 'prompt' and 'target'.")] = "aclsum",
    validation: Annotated[
        Path | None, typer.Option(help="JSON-lines file to measure the loss on; without it, every tenth example.")
    ] = None,
    budget: Budget = 0.5,
    steps: Steps = 75,
    every: Every = 25,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.", min=1)] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.", min=1)] = 224,
    learning_rate: Annotated[float, typer.Option(help="Peak of a linear decay to 0, AdamW.", min=0)] = 5e-5,
    seed: Annotated[int, typer.Option(help="Of the order of the examples and of dropout.")] = 0,
    attention: Annotated[Attention, typer.Option(help="Attention of the model.")] = Attention.EAGER,
    allow_unsupported: AllowUnsupported = False,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained model.", file_okay=False)] = None,
    save_importance: Annotated[Path | None, typer.Option(help="Write the last importances here (JSON).")] = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a causal language model under a budget.

    Under torchrun the processes train together, each with --batch-size sequences a step.

    Example: gtflops train smollm2 --data aclsum --budget 0.5 --steps 75 --html run.html
    """
    from gtflops.files import write_whole
    from gtflops.recipes.datasets import aclsum, jsonl
    from gtflops.recipes.finetune import FineTuneSettings, finetune
    from gtflops.recipes.models import load_pretrained
    from gtflops.training import processes

    if data == "aclsum":
        train, held_out = aclsum("train"), aclsum("val")
    else:
        examples = jsonl(Path(data))
        train = examples if validation else [example for index, example in enumerate(examples) if index % 10]
        held_out = jsonl(validation) if validation else examples[::10]
    settings = FineTuneSettings(
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        budget=budget,
        every=every,
        learning_rate=learning_rate,
        seed=seed,
        allow_unsupported=allow_unsupported,
    )
    _require_writable(html, ".html")
    _require_writable(save_importance)
    with processes.started() as device, _progress() as advance:
        advance("load", 0, 1)
        pretrained = load_pretrained(model, attention=attention.value)
        pretrained.model.to(device)
        advance("load", 1, 1)
        advance("train", 0, steps)
        result = finetune(
            pretrained.model,
            pretrained.tokenizer,
            train,
            held_out,
            settings,
            on_step=lambda record: advance("train", record.step + 1, steps),
        )
    if processes.rank() > 0:
        return
    if as_json:
        _print_json(_run_json(result))
    else:
        out.print(_runs_table({f"budget {budget:g}": result}))
    if save is not None:
        pretrained.model.save_pretrained(save)
        pretrained.tokenizer.save_pretrained(save)
    if save_importance is not None and result.selection is not None:
        write_whole(save_importance, json.dumps(dict(result.selection.importance), indent=1))
    if html is not None:
        _write_html(html, result.profile, result.selection, result.log)
    _say_written(save, save_importance, html)


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Option("--out", help="Folder for report.html and results.json.")] = Path("demo"),
    steps: Steps = 10,
    every: Every = 5,
    budget: Budget = 0.5,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """SmolLM2-135M on ACLSum, full fine-tuning and under a budget, side by side.

    Example: gtflops demo --steps 20 --every 10
    """
    from gtflops.files import write_whole
    from gtflops.recipes.demo import run_demo
    from gtflops.recipes.finetune import FineTuneSettings

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; expected a folder") from error
    with _progress() as advance:
        demo = run_demo(FineTuneSettings(steps=steps, every=every, budget=budget, seed=seed), advance)
    results = _demo_json(demo)
    write_whole(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    _write_html(folder / "report.html", demo.profile, demo.budgeted.selection, demo.budgeted.log)
    if as_json:
        _print_json(results)
    else:
        out.print(_runs_table({"full": demo.full, f"budget {budget:g}": demo.budgeted}))
        forward = demo.profile.step_flops("none", ops="matmul").forward
        by_fvcore = "not counted" if demo.fvcore_forward is None else f"{demo.fvcore_forward:,}"
        out.print(f"Forward pass, matrix products: {forward:,} FLOP by gtflops, {by_fvcore} by fvcore (MACs x 2).")
        out.print(
            f"SmolLM2-135M-Instruct on ACLSum, {steps} steps of {demo.settings.batch_size} x {demo.settings.seq_len} "
            f"tokens, AdamW {demo.settings.learning_rate:g}, float32, {demo.threads} threads, seed {seed}; "
            f"Python {demo.python}, " + ", ".join(f"{name} {number}" for name, number in demo.versions.items()),
            highlight=False,
        )
    _say_written(folder / "report.html", folder / "results.json")


# --- what is printed --------------------------------------------------------------------------------------------


def _print_wide(table: RenderableType) -> None:
    """In a pipe there is no width to keep to, and names of operators stay whole."""
    (out if out.is_terminal else Console(width=200)).print(table)


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {"operators": entry.ops, "kind": entry.kind, "formula": entry.text, "source": entry.source}


def _runs_table(runs: "dict[str, FineTuneResult]") -> Table:
    """Runs side by side, a column each."""
    from gtflops.units import format_flops, format_seconds

    table = Table(title="Fine-tuning under a budget of FLOPs", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")

    def row(label: str, cell: "Callable[[FineTuneResult], str]") -> None:
        table.add_row(label, *(cell(result) for result in runs.values()))

    row("planned FLOPs, all steps", lambda run: format_flops(run.log.planned_flops))
    row(
        "planned FLOPs a step, share of full",
        lambda run: f"{run.log.steps[0].planned_flops / run.log.steps[0].full_flops:.3f}",
    )
    row("FLOPs to measure importance", lambda run: format_flops(run.log.measuring_flops))
    table.add_section()
    row("one step, planned", lambda run: f"{run.counted.planned:,}")
    row("one step, executed (gtflops' table)", lambda run: f"{run.counted.executed:,}")
    row("one step, planned, matrix products", lambda run: f"{run.counted.planned_matmul:,}")
    row("one step, executed, by PyTorch's counter", lambda run: f"{run.counted.pytorch_matmul:,}")
    table.add_section()
    row("seconds of training steps", lambda run: format_seconds(sum(step.seconds or 0 for step in run.log.steps)))
    row("seconds of selecting", lambda run: format_seconds(sum(record.seconds for record in run.log.selections)))
    row("validation loss before", lambda run: f"{run.loss_before:.4f}")
    row("validation loss after", lambda run: f"{run.loss_after:.4f}")
    table.add_section()
    row("selected tensors", lambda run: f"{_num_selected(run)} of {len(run.profile.tensors)}")
    row(
        "importance captured",
        lambda run: "all" if run.selection is None else f"{run.selection.importance_captured:.1%}",
    )
    return table


def _num_selected(run: "FineTuneResult") -> int:
    return len(run.profile.tensors) if run.selection is None else len(run.selection.names)


def _run_json(run: "FineTuneResult") -> dict[str, Any]:
    return {
        "planned_flops": run.log.planned_flops,
        "measuring_flops": run.log.measuring_flops,
        "full_step_flops": run.profile.full_flops,
        "counted_step": {
            "planned": run.counted.planned,
            "executed": run.counted.executed,
            "planned_matmul": run.counted.planned_matmul,
            "pytorch_matmul": run.counted.pytorch_matmul,
        },
        "step_seconds": [step.seconds for step in run.log.steps],
        "select_seconds": [record.seconds for record in run.log.selections],
        "losses": [step.loss for step in run.log.steps],
        "validation_loss_before": run.loss_before,
        "validation_loss_after": run.loss_after,
        "selections": [
            {"step": record.step, **record.selection.to_json()}
            for record in run.log.selections
            if record.selection is not None
        ],
    }


def _demo_json(demo: "Demo") -> dict[str, Any]:
    return {
        "versions": demo.versions,
        "python": demo.python,
        "threads": demo.threads,
        "steps": demo.settings.steps,
        "batch_size": demo.settings.batch_size,
        "seq_len": demo.settings.seq_len,
        "learning_rate": demo.settings.learning_rate,
        "seed": demo.settings.seed,
        "budget": demo.settings.budget,
        "forward_matmul": demo.profile.step_flops("none", ops="matmul").forward,
        "fvcore_forward": demo.fvcore_forward,
        "full": _run_json(demo.full),
        "budgeted": _run_json(demo.budgeted),
    }


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _say_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            err.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


# --- what is read and called ------------------------------------------------------------------------------------


def _is_saved(model: str) -> bool:
    return model.endswith(".json") or Path(model).is_file()


def _profile(
    model: str,
    batch_size: int | None,
    seq_len: int | None,
    decoder_len: int | None,
    attention: Attention | None,
    *,
    compiled: bool = False,
) -> "Profile":
    """A saved profile, at other sizes if some are given, or a new one of a model by name."""
    from gtflops.profiling import Profile, profile

    if not _is_saved(model):
        graph: Literal["eager", "compiled"] = "compiled" if compiled else "eager"
        with err.status(f"tracing {model}"):
            return profile(model, graph=graph, **_sizes(model, batch_size, seq_len, decoder_len, attention))
    saved = Profile.load(model)
    if attention is not None:
        raise InputError(f"{model} is a saved profile, whose attention is what it was; leave --attention out")
    if compiled and saved.compiled is None:
        raise InputError(
            f"{model} holds no compiled step, expected a profile that was saved with --compiled; profile the model "
            "again by its name"
        )
    return (
        saved.at(batch_size=batch_size, seq_len=seq_len, decoder_len=decoder_len)
        if (batch_size or seq_len or decoder_len)
        else saved
    )


def _sizes(
    model: str, batch_size: int | None, seq_len: int | None, decoder_len: int | None, attention: Attention | None
) -> dict[str, Any]:
    """What was asked for, with the defaults of the command line: a length only for models that have one."""
    from gtflops.capture import takes_images

    return {
        "batch_size": batch_size or 4,
        "seq_len": 512 if seq_len is None and not takes_images(model) else seq_len,
        "decoder_len": decoder_len,
        "attention": (attention or Attention.EAGER).value,
    }


def _read(path: str) -> dict[str, float]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read importances from {path}: {error}; expected a JSON object of numbers") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, expected a JSON object with a number for each tensor")
    return data


def _require_writable(path: Path | None, suffix: str = "") -> None:
    """An output that cannot be written is refused before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path is not None and not path.name.endswith(suffix):
        raise InputError(f"{path} does not end in {suffix}")


def _write_html(path: Path, costs: "Profile", selection: "Selection | None" = None, log: Any = None) -> None:
    from gtflops.report import write

    _require_writable(path, ".html")
    with err.status(f"writing {path}"):
        write(path, costs, selection, log)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage, on stderr."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield advance


def main() -> None:
    """Run the command line; errors of the user's input are one line on stderr and exit code 2."""
    # The notices of the libraries below would stand between ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    out.quiet = err.quiet = os.environ.get("RANK", "0") != "0"  # torchrun's first process speaks for all
    try:
        app(prog_name="gtflops")
    except GtflopsError as error:
        if os.environ.get(DEBUG):
            raise
        err.print(f"[bold red]error:[/] {type(error).__name__}", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
