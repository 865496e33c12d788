"""The command line: parse, call, print."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from gtflops.errors import GtflopsError, InputError
from gtflops.operators import Entry, Kind
from gtflops.units import Unit, count_of, format_exactly, format_flops, format_seconds, quantity_of

if TYPE_CHECKING:
    from gtflops.profiling import Profile
    from gtflops.recipes.adapters import Lora
    from gtflops.recipes.advise import Advice
    from gtflops.recipes.compare import Comparison
    from gtflops.recipes.datasets import DataSet
    from gtflops.recipes.demo import Demo
    from gtflops.recipes.finetune import FineTuneResult, InterruptedRunError
    from gtflops.recipes.models import Pretrained
    from gtflops.selection import Selection
    from gtflops.training import Energy, EnergyMeter, TrainingLog, Watcher
    from gtflops.training.budgets import BudgetLike

app = typer.Typer(
    help="What a training step costs, exactly; which tensors are worth training under a FLOPs budget; train them.",
    epilog="Leaves with 0 when all is done; with 1 when a step was not what was predicted, a scheme of several failed, "
    "or something happened that gtflops did not expect; with 2 when what was given cannot be used; with 130 after "
    "Ctrl-C. Errors are one line on stderr. NO_COLOR, TERM and COLUMNS are respected.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
#: Set in the environment by --debug, or by the user.
DEBUG = "GTFLOPS_DEBUG"

# In a pipe there is no width to keep to, and names stay whole, unless COLUMNS asks for one.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)
err = Console(stderr=True)


class Attention(StrEnum):
    """How a model that is built by name computes attention."""

    EAGER = "eager"
    SDPA = "sdpa"


class FormOption(StrEnum):
    """How a selection is charged."""

    GRAPH = "graph"
    CHAIN = "chain"


class CostOption(StrEnum):
    """What a budget is a share of."""

    FLOPS = "flops"
    TIME = "time"


class GranularityOption(StrEnum):
    """What is chosen as a whole."""

    TENSOR = "tensor"
    LAYER = "layer"


class UsesChoice(StrEnum):
    """Whether the uses of a shared tensor are told apart."""

    SEPARATE = "separate"


def _presets(incomplete: str) -> list[str]:
    """What a shell proposes for a model; it proposes files where this is nothing."""
    from importlib.resources import files  # of what gtflops.capture reads, which needs torch

    text = files("gtflops").joinpath("capture", "presets.json").read_text(encoding="utf-8")
    return [name for name in json.loads(text) if name.startswith(incomplete)]


def _weights(incomplete: str) -> list[str]:
    """The same where weights are needed: a preset is a Hugging Face id."""
    return [name for name in ("smollm2", *_presets("")) if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A saved profile (.json), a local folder, a preset, or a Hugging Face id.",
        show_default=False,
        autocompletion=_presets,
    ),
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
UsesOption = Annotated[
    UsesChoice | None,
    typer.Option(
        "--uses",
        help="Each use of a tensor that several modules share, as a tied embedding, by itself: lm_head.weight beside "
        "model.embed_tokens.weight.",
    ),
]
AllowUnsupported = Annotated[bool, typer.Option(help="Count operators without a price as free.")]
UnitOption = Annotated[
    Unit, typer.Option("--unit", help="Unit of the costs in what is printed: FLOPs, or multiply-adds (2 FLOPs).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Html = Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.", dir_okay=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]
Budget = Annotated[float, typer.Option(help="Share of a full step's FLOPs that a step may cost, in (0, 1].")]
StepBudget = Annotated[
    str,
    typer.Option(
        help="What a step may cost: a share of a full step, in (0, 1], or as '1.2 TFLOP', '600 GMAC', or "
        "'35 ms' with --cost time."
    ),
]
Importance = Annotated[
    str,
    typer.Option(
        help="A JSON file with a number for each tensor, such as 'train' writes; or 'numel', each tensor's number of "
        "elements, which is a stand-in and no measurement.",
        show_default=False,
    ),
]
Cost = Annotated[
    CostOption, typer.Option(help="What a step costs: FLOPs, or the time that gtflops.measure_time put in the profile.")
]
Form = Annotated[FormOption, typer.Option(help="Charge what a step executes, or the chain form's upper bound of it.")]
Granularity = Annotated[
    GranularityOption, typer.Option(help="Choose single tensors, or layers as a whole (for torch.compile).")
]
MustTrain = Annotated[
    list[str] | None, typer.Option(help="Train the tensors of such names in any case, as '*.bias'; repeatable.")
]
MustFreeze = Annotated[
    list[str] | None, typer.Option(help="Train no tensors of such names, as 'model.embed*'; repeatable.")
]
MaxElements = Annotated[
    str | None,
    typer.Option(help="Elements that all trained tensors may have together, as 30000000, '30M' or '1.5B'."),
]
Steps = Annotated[int, typer.Option(help="Optimizer steps.", min=1)]
Every = Annotated[int, typer.Option(help="Optimizer steps between two selections.", min=1)]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

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
    uses: UsesOption = None,
    trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="What a step costs that trains just these, beside the full step: tensors of such names, as "
            "'*.bias' (repeatable), or adapters on modules of such names, as 'lora:r=8,q_proj,v_proj'."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the profile here, for select and later reports.")] = None,
    html: Html = None,
    force: Force = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Price what torch.compile would run as well, beside the eager step.")
    ] = False,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
    top: Annotated[int, typer.Option(help="How many tensors to list.", min=0)] = 10,
) -> None:
    """What one training step costs, and where.

    Example: gtflops profile facebook/opt-2.7b --batch-size 4 --seq-len 512 --html opt.html

    Example: gtflops profile facebook/opt-2.7b --trainable 'lora:r=8,q_proj,v_proj'
    """
    from gtflops.report.summary import summarise
    from gtflops.report.terminal import profile_tables, step_table

    _require_flops(unit, as_json)
    for path, suffix in ((html, ".html"), (save, "")):
        _require_writable(path, suffix)
        _require_free(path, force)
    wishes = trainable or []
    adapters = _adapters(wishes, model)
    costs = _profile(model, batch_size, seq_len, decoder_len, attention, compiled=compiled, uses=uses)
    adapted: Profile = costs
    trained: Sequence[str] = costs.names
    if adapters is not None:
        sizes = _sizes(model, batch_size, seq_len, decoder_len, attention)
        adapted, trained = _with_adapters(model, adapters, sizes)
    elif wishes:
        trained = _matching(wishes, costs)
    if save is not None:
        costs.save(save)
    if html is not None:
        _write_html(html, costs)
    if wishes and as_json:
        _print_json(_step_json(costs, adapted, trained))
    elif wishes:
        out.print(step_table(costs, adapted, trained, ", ".join(wishes), unit))
    elif as_json:
        _print_json(summarise(costs).to_json())
    else:
        out.print(profile_tables(costs, top, unit))
    _say_written(save, html)


@app.command("verify")
def verify_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A local folder, a preset, or a Hugging Face id.", show_default=False, autocompletion=_presets
        ),
    ],
    selections: Annotated[int, typer.Option(help="Random selections, besides none, all, first and last.", min=0)] = 5,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    seed: Annotated[int, typer.Option(help="Of the random selections.")] = 0,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """Hold the prediction against what PyTorch executes, and against other counters.

    Steps run without weights and compute nothing. Leaves with 1 where a step was not what was predicted.

    Example: gtflops verify facebook/opt-125m --batch-size 2 --seq-len 128 --selections 10
    """
    from gtflops.report.terminal import verification_tables

    _require_flops(unit, as_json)
    if _is_saved(model):
        raise InputError(
            f"{model} is a saved profile, which holds no model to run; expected a folder, a preset or an id"
        )
    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    with err.status("running real steps"):
        from gtflops.capture import architecture

        built = architecture(model, **_sizes(model, batch_size, seq_len, decoder_len, attention))
        found = costs.verify(built.model, built.batch, selections=selections, seed=seed)
    if as_json:
        _print_json(found.to_json())
    else:
        out.print(verification_tables(costs, found, unit))
    if not found.exact:
        raise typer.Exit(1)


@app.command("select")
def select_command(
    model: Model,
    importance: Importance,
    budget: StepBudget = "0.5",
    cost: Cost = CostOption.FLOPS,
    form: Form = FormOption.GRAPH,
    granularity: Granularity = GranularityOption.TENSOR,
    must_train: MustTrain = None,
    must_freeze: MustFreeze = None,
    max_elements: MaxElements = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    uses: UsesOption = None,
    allow_unsupported: AllowUnsupported = False,
    html: Html = None,
    force: Force = False,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """Which tensors to train within a budget.

    Example: gtflops select opt.profile.json --importance importance.json --budget 0.5 --must-freeze '*embed*'
    """
    from gtflops.report.terminal import selection_table
    from gtflops.selection import select

    _require_flops(unit, as_json)
    _require_writable(html, ".html")
    _require_free(html, force)
    limit, elements = _limit(budget), _elements(max_elements)
    costs = _profile(model, batch_size, seq_len, decoder_len, attention, uses=uses)
    _require_cost(costs, cost, model)
    with err.status("selecting"):
        selection = select(
            costs,
            _importance(importance, costs),
            **limit,
            form=form.value,
            granularity=granularity.value,
            must_train=must_train or (),
            must_freeze=must_freeze or (),
            max_elements=elements,
            cost=cost.value,
            allow_unsupported=allow_unsupported,
        )
    if html is not None:
        _write_html(html, costs, selection)
    if as_json:
        _print_json(selection.to_json())
    else:
        out.print(selection_table(selection, unit))
        _say_importance(importance)
    _say_written(html)


@app.command("frontier")
def frontier_command(
    model: Model,
    importance: Importance,
    budgets: Annotated[
        int,
        typer.Option(help="How many, evenly spaced from the smallest step that trains something to the full.", min=2),
    ] = 20,
    cost: Cost = CostOption.FLOPS,
    form: Form = FormOption.GRAPH,
    granularity: Granularity = GranularityOption.TENSOR,
    must_train: MustTrain = None,
    must_freeze: MustFreeze = None,
    max_elements: MaxElements = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    allow_unsupported: AllowUnsupported = False,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """How much importance each budget buys.

    Example: gtflops frontier opt.profile.json --importance importance.json --budgets 10
    """
    from gtflops.curve import frontier
    from gtflops.report.terminal import frontier_table

    _require_flops(unit, as_json)
    elements = _elements(max_elements)
    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    _require_cost(costs, cost, model)
    with err.status(f"selecting within {budgets} budgets"):
        curve = frontier(
            costs,
            _importance(importance, costs),
            budgets=budgets,
            form=form.value,
            granularity=granularity.value,
            must_train=must_train or (),
            must_freeze=must_freeze or (),
            max_elements=elements,
            cost=cost.value,
            allow_unsupported=allow_unsupported,
        )
    if as_json:
        _print_json(curve.to_json())
    else:
        out.print(frontier_table(curve, unit))
        _say_importance(importance)


def _print_schema(wanted: bool) -> None:
    if wanted:
        from gtflops.report import schema

        _print_json(schema())
        raise typer.Exit


@app.command("report")
def report_command(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The report: .html, .md, .json or .csv.", show_default=False)
    ],
    importance: Annotated[
        str | None,
        typer.Option(
            help="What a budget buys, as of 'select': a JSON file of numbers, or 'numel'.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Select within this, as of 'select': 0.5 or '1.2 TFLOP', and report that.", show_default=False
        ),
    ] = None,
    selection: Annotated[
        Path | None, typer.Option(help="Report this selection, as 'gtflops select --json' prints it.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Report this run, as 'gtflops train --log' writes it.", show_default=False)
    ] = None,
    force: Force = False,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of .json reports."),
    ] = False,
) -> None:
    """What a step costs, what each budget buys, what was trained: one file to send to a colleague.

    Example: gtflops report opt.profile.json --importance importance.json --budget 0.5 --log run.jsonl --output opt.html
    """
    from gtflops.report import require_suffix, write
    from gtflops.report.log import training_log
    from gtflops.selection import select

    _require_writable(output)
    _require_free(output, force)
    require_suffix(output)
    if budget is not None and selection is not None:
        raise InputError("--budget and --selection are given; expected one of them")
    if importance is None and (budget is not None or selection is not None):
        option = "--selection" if budget is None else "--budget"
        raise InputError(f"{option} needs the importances that the selection goes by; add --importance FILE or numel")
    costs = _profile(model, batch_size, seq_len, decoder_len, attention)
    numbers = None if importance is None else _importance(importance, costs)
    chosen = None
    if numbers is not None and selection is not None:
        chosen = _saved_selection(selection, costs, numbers)
    elif numbers is not None and budget is not None:
        chosen = select(costs, numbers, **_limit(budget), allow_unsupported=True)
    with err.status(f"writing {output}"):
        write(output, costs, chosen, None if log is None else training_log(log, costs), numbers)
    _say_written(output)


@app.command("ops")
def ops_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="List what this model uses: a saved profile, a folder, a preset or an id.", autocompletion=_presets
        ),
    ] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_len: DecoderLen = None,
    attention: AttentionOption = None,
    kind: Annotated[Kind | None, typer.Option(help="Only operators of this class.")] = None,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """The operators that have a price, their formulas and where these are from; or what a model uses of them.

    Example: gtflops ops --model facebook/opt-125m --seq-len 128
    """
    from gtflops.operators import TABLE
    from gtflops.report.summary import summarise
    from gtflops.report.terminal import operators_table, used_operators_table

    _require_flops(unit, as_json)
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
        _print_wide(used_operators_table(costs, kind, unit))


# --- train and compare ------------------------------------------------------------------------------------------

Weights = Annotated[
    str,
    typer.Argument(
        help="'smollm2', a local folder, a GGUF file, or a Hugging Face id, with weights.",
        show_default=False,
        autocompletion=_weights,
    ),
]
Data = Annotated[
    str,
    typer.Option(help="scitldr, dialogsum, webquestions, piqa, aclsum, or a JSON-lines file (jsonl with --data-path)."),
]
DataPath = Annotated[
    Path | None, typer.Option(help="A local copy of the data: a folder with its own files; the hub without it.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Columns of a JSON-lines file, as prompt=question,target=answer; prompt and target unless given."
    ),
]
ValidationFile = Annotated[
    Path | None, typer.Option(help="JSON-lines file to measure on; without it, every tenth example of such a file.")
]
MaybeSteps = Annotated[int | None, typer.Option(help="Optimizer steps; 75 unless --epochs is given.", min=1)]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training examples, in place of --steps.", min=1)]
Sequences = Annotated[int, typer.Option(help="Sequences in a batch.", min=1)]
Tokens = Annotated[
    int | None, typer.Option(help="Tokens in a sequence; the data set's own length unless given.", min=1)
]
TargetLen = Annotated[
    int | None,
    typer.Option(help="Most tokens to generate, and length of an encoder-decoder's labels; the data set's own.", min=1),
]
LearningRate = Annotated[float, typer.Option(help="Peak of a linear decay to 0, AdamW.", min=0)]
Seed = Annotated[int, typer.Option(help="Of the order of the examples, new weights and dropout.")]
NumValidation = Annotated[
    int | None, typer.Option("--loss-examples", help="Validation examples for the loss; all unless given.", min=1)
]
NumQuality = Annotated[
    int,
    typer.Option("--quality-examples", help="Validation examples to generate a text for and to judge; 0: none.", min=0),
]
ModelAttention = Annotated[Attention, typer.Option(help="Attention of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda; cuda where there is one unless given.")]

# What a run goes by, and leaves behind.
MovingBudget = Annotated[
    str | None,
    typer.Option(
        help="Share of a full step's FLOPs that a step may cost, in (0, 1], or one for each epoch, as 0.4,0.5,0.7; "
        "or 'auto' for what brings most, with or without --total; 0.5 unless given.",
        rich_help_panel="Budget",
    ),
]
#: Where --until ends a run, and neither --steps nor --epochs does.
MOST_EPOCHS = 100
TotalOption = Annotated[
    str | None,
    typer.Option(
        help="What the whole run may spend, in place of --budget, or with --budget auto: '2 PFLOP', '3 h', or "
        "'1.5 kWh' (with --energy).",
        rich_help_panel="Budget",
    ),
]
UntilOption = Annotated[
    str | None,
    typer.Option(
        help="FLOPs that end the run of any scheme, as '50 TFLOP', the rate falling to 0 there; --steps or --epochs "
        f"are then the most that are made, {MOST_EPOCHS} epochs unless given.",
        rich_help_panel="Budget",
    ),
]
Grid = Annotated[
    Path | None,
    typer.Option(
        help="CSV file with the columns time and intensity (gCO2/kWh), which --shares go by, in place of --budget.",
        rich_help_panel="Budget",
    ),
]
Shares = Annotated[
    str,
    typer.Option(help="Share of a full step from each intensity of --grid on.", rich_help_panel="Budget"),
]
#: What --budget is where what brings most is to be found out.
AUTO = "auto"
#: What --shares is unless given.
SHARES = "0=1.0,200=0.6,400=0.4"
EveryOption = Annotated[
    str, typer.Option(help="Optimizer steps between two selections, or 'epoch'.", rich_help_panel="Budget")
]
EnergyOption = Annotated[
    str | None,
    typer.Option(
        help="Measure energy and CO2: a country by three letters, as FRA; gCO2/kWh; or a CSV file as of --grid.",
        rich_help_panel="What the run leaves",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for what the blocks below the trained tensors compute: stored in the first epoch, read in later "
        "ones. The budget is then the average over the epochs.",
        file_okay=False,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints: at the end, and when Ctrl-C ends the run.",
        file_okay=False,
        rich_help_panel="What the run leaves",
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(help="A checkpoint after every so many steps, too.", min=1, rich_help_panel="What the run leaves"),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the last checkpoint; what a step depends on has to be as it was.",
        rich_help_panel="What the run leaves",
    ),
]
Log = Annotated[
    Path | None,
    typer.Option(
        help="Write each selection and step here, as lines of JSON.",
        dir_okay=False,
        rich_help_panel="What the run leaves",
    ),
]
TensorBoardOption = Annotated[
    Path | None, typer.Option(help="Folder for TensorBoard.", file_okay=False, rich_help_panel="What the run leaves")
]
TrimOption = Annotated[
    bool,
    typer.Option(
        "--trim",
        help="Batches by length, without padding, the head at labels alone: the same loss for fewer FLOPs.",
    ),
]
Accumulate = Annotated[int, typer.Option(help="Batches whose gradients make one optimizer step.", min=1)]


@app.command("train")
def train_command(
    model: Weights,
    scheme: Annotated[
        str, typer.Option(help="full, top2 (or top15, ...), bitfit, lora, prefix, lisa or greentrainer.")
    ] = "greentrainer",
    data: Data = "aclsum",
    data_path: DataPath = None,
    columns: Columns = None,
    validation: ValidationFile = None,
    budget: MovingBudget = None,
    total: TotalOption = None,
    grid: Grid = None,
    shares: Shares = SHARES,
    steps: MaybeSteps = None,
    epochs: Epochs = None,
    every: EveryOption = "25",
    granularity: Granularity = GranularityOption.TENSOR,
    must_train: MustTrain = None,
    must_freeze: MustFreeze = None,
    uses: UsesOption = None,
    accumulate: Accumulate = 1,
    batch_size: Sequences = 4,
    seq_len: Tokens = None,
    target_len: TargetLen = None,
    trim: TrimOption = False,
    learning_rate: LearningRate = 5e-5,
    seed: Seed = 0,
    loss_examples: NumValidation = None,
    quality_examples: NumQuality = 16,
    attention: ModelAttention = Attention.EAGER,
    device: Device = None,
    allow_unsupported: AllowUnsupported = False,
    energy: EnergyOption = None,
    store: StoreOption = None,
    checkpoints: Checkpoints = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    log: Log = None,
    tensorboard: TensorBoardOption = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained model.", file_okay=False)] = None,
    save_importance: Annotated[Path | None, typer.Option(help="Write the last importances here (JSON).")] = None,
    html: Html = None,
    force: Force = False,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a language model, under a budget or by a scheme to compare with.

    Under torchrun the processes train together, each with --batch-size sequences a step. Leaves with 130 where Ctrl-C
    ended the run.

    Example: gtflops train smollm2 --scheme greentrainer --data aclsum --budget 0.5 --steps 75 --html run.html

    Example: gtflops train smollm2 --epochs 3 --budget 0.4,0.5,0.7 --every epoch

    Example: gtflops train smollm2 --epochs 5 --budget 0.3 --every epoch --store activations

    Example: gtflops train smollm2 --epochs 3 --total '1.5 kWh' --energy FRA --checkpoints run --log run.jsonl

    Example: gtflops train smollm2 --epochs 3 --budget auto --total '200 TFLOP'

    Example: torchrun --nproc-per-node 2 -m -- gtflops train smollm2 --checkpoints run --log run.jsonl
    """
    from gtflops.files import write_whole
    from gtflops.recipes.finetune import FineTuneSettings, InterruptedRunError, finetune
    from gtflops.recipes.schemes import scheme as scheme_of
    from gtflops.report.log import end_line
    from gtflops.training import processes

    _require_flops(unit, as_json)
    if (resume or checkpoint_every is not None) and checkpoints is None:
        raise InputError(f"{'--resume' if resume else '--checkpoint-every'} needs the folder of --checkpoints")
    for path, suffix in ((html, ".html"), (save_importance, ""), (log, "")):
        _require_writable(path, suffix)
    for path in (html, save_importance, None if resume else log):  # a run that is resumed goes on in its log
        _require_free(path, force)
    _require_free(save, force, is_folder=True)
    for folder in (save, store, checkpoints, tensorboard):
        if folder is not None:
            _make_folder(folder)
    conditions = {
        "--budget": budget,
        "--total": total,
        "--grid": grid,
        "--must-train": must_train,
        "--must-freeze": must_freeze,
        "--uses": uses,
        "--granularity": granularity if granularity is not GranularityOption.TENSOR else None,
    }
    given = _given(conditions)
    if given and not scheme_of(scheme).budgeted:
        raise InputError(f"{given[0]} is for the scheme greentrainer, which selects; {scheme} does not")
    moving = _budget(budget, total, grid, shares, energy)
    meter = None if energy is None else _meter(energy)
    # What _require_free let pass may be replaced; a file that has come since then may not.
    watchers = _watchers(log, tensorboard, replace=log is not None and log.exists())
    examples = _data(data, data_path, columns, validation)
    with processes.started() as own_device, _progress() as advance:
        settings = FineTuneSettings(
            steps=_num_steps(steps, epochs, len(examples.train), batch_size, accumulate, processes.count()),
            scheme=scheme,
            batch_size=batch_size,
            seq_len=seq_len or examples.seq_len,
            target_len=target_len or examples.target_len,
            accumulate=accumulate,
            budget=moving,
            every=_every(every),
            granularity=granularity.value,
            must_train=tuple(must_train or ()),
            must_freeze=tuple(must_freeze or ()),
            uses=None if uses is None else "separate",
            trim="auto" if trim else None,
            learning_rate=learning_rate,
            seed=seed,
            num_validation=loss_examples,
            num_quality=quality_examples,
            store=store,
            allow_unsupported=allow_unsupported,
        )
        pretrained = _pretrained(model, attention, str(own_device) if own_device is not None else device, advance)
        advance("train", 0, settings.steps)
        try:
            result = finetune(
                pretrained.model,
                pretrained.tokenizer,
                examples,
                settings,
                on_step=lambda record: advance("train", record.step + 1, settings.steps),
                save=save,
                energy=meter,
                watchers=watchers,
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
        except InterruptedRunError as interruption:
            stopped: InterruptedRunError | None = interruption
        else:
            stopped = None
    if stopped is not None:
        _say_interrupted(stopped)
        raise typer.Exit(130)
    if processes.rank() > 0:
        return
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(end_line(result.log))
    if as_json:
        _print_json(_run_json(result))
    else:
        label = total or (f"by {grid}" if grid is not None else f"budget {budget or '0.5'}")
        if budget == AUTO and total is not None:
            label = f"{AUTO}, {total}"
        out.print(_runs_table({label if result.scheme.budgeted else result.scheme.name: result}, unit, trimmed=trim))
    if save_importance is not None and result.selection is not None:
        write_whole(save_importance, json.dumps(dict(result.selection.importance), indent=1))
    if html is not None:
        _write_html(html, result.profile, result.selection, result.log)
    _say_written(save, save_importance, html, log)
    _say_reasons(result)
    _say_stopped(result, settings.steps)


@app.command("compare")
def compare_command(
    model: Weights,
    schemes: Annotated[
        str,
        typer.Option(
            help="Names with commas between them, as 'gtflops train' has them; greentrainer@0.7 for a budget."
        ),
    ] = "full,lora,greentrainer",
    data: Data = "aclsum",
    data_path: DataPath = None,
    columns: Columns = None,
    validation: ValidationFile = None,
    budget: MovingBudget = None,
    total: TotalOption = None,
    grid: Grid = None,
    shares: Shares = SHARES,
    until: UntilOption = None,
    steps: MaybeSteps = None,
    epochs: Epochs = None,
    every: EveryOption = "25",
    batch_size: Sequences = 4,
    seq_len: Tokens = None,
    target_len: TargetLen = None,
    trim: TrimOption = False,
    learning_rate: LearningRate = 5e-5,
    learning_rate_of: Annotated[
        list[str] | None, typer.Option(help="Another rate for one scheme, as lora=5e-4; repeatable.")
    ] = None,
    seed: Seed = 0,
    loss_examples: NumValidation = None,
    quality_examples: NumQuality = 16,
    count: Annotated[bool, typer.Option(help="Count what every step executes; times are some percent longer.")] = True,
    attention: ModelAttention = Attention.EAGER,
    device: Device = None,
    allow_unsupported: AllowUnsupported = False,
    energy: EnergyOption = None,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """Several schemes from the same weights and seeds, in one table.

    --budget, or what takes its place, is that of greentrainer without an @. With --until, all spend the same: a scheme
    with cheaper steps makes more of them, and full fine-tuning fewer.

    Example: gtflops compare smollm2 --schemes full,lora,greentrainer --data aclsum --learning-rate-of lora=5e-4

    Example: gtflops compare smollm2 --schemes full,greentrainer --epochs 3 --budget 0.4,0.5,0.7 --every epoch

    Example: gtflops compare smollm2 --schemes full,top15,lora,greentrainer --until '50 TFLOP' --every epoch --trim
    """
    from gtflops.recipes.compare import compare
    from gtflops.recipes.finetune import FineTuneSettings

    _require_flops(unit, as_json)
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    given = _given({"--budget": budget, "--total": total, "--grid": grid})
    if given and "greentrainer" not in names:
        raise InputError(
            f"{given[0]} is for the scheme greentrainer without a budget of its own, and --schemes is {schemes}; "
            f"expected greentrainer among them, or no {given[0]}"
        )
    moving = _budget(budget, total, grid, shares, energy)
    examples = _data(data, data_path, columns, validation)
    if until is not None and steps is None and epochs is None:
        if total is not None or (budget is not None and "," in budget):
            raise InputError(
                f"{'--total' if total is not None else '--budget'} goes by the steps or epochs of a run, whose number "
                "--until alone leaves open; expected --steps or --epochs besides"
            )
        epochs = MOST_EPOCHS
    settings = FineTuneSettings(
        steps=_num_steps(steps, epochs, len(examples.train), batch_size),
        until=None if until is None else _total_flops("--until", until),
        batch_size=batch_size,
        seq_len=seq_len or examples.seq_len,
        target_len=target_len or examples.target_len,
        budget=moving,
        every=_every(every),
        trim="auto" if trim else None,
        learning_rate=learning_rate,
        seed=seed,
        num_validation=loss_examples,
        num_quality=quality_examples,
        count_executed=count,
        allow_unsupported=allow_unsupported,
    )
    rates = _pairs("learning-rate-of", learning_rate_of or [])
    with _progress() as advance:
        pretrained = _pretrained(model, attention, device, advance)
        compared = compare(
            pretrained,
            examples,
            names,
            settings,
            learning_rates={name: _number(f"the learning rate of {name}", rate) for name, rate in rates.items()},
            energy=None if energy is None else lambda: _meter(energy),
            on_progress=advance,
        )
    if as_json:
        _print_json(_comparison_json(compared))
    else:
        _print_wide(_comparison_table(compared, unit))
    for name, made in compared.runs.items():
        _say_reasons(made, f"{name} ")
        _say_stopped(made, settings.steps, f"{name} ")
    for name, message in compared.failed.items():
        err.print(f"{name} failed: {message}", markup=False, highlight=False, soft_wrap=True)
    if compared.failed:
        raise typer.Exit(1)


def _data(data: str, path: Path | None, columns: str | None, validation: Path | None) -> "DataSet":
    """A data set by name; a name that is none is the path of a JSON-lines file."""
    from gtflops.recipes.datasets import NAMES, load

    is_file = path is None and data not in NAMES and (data.endswith(".jsonl") or Path(data).exists())
    name, where = ("jsonl", Path(data)) if is_file else (data, path)
    named = None if columns is None else _pairs("columns", columns.split(","))
    with err.status(f"reading {data}"):
        return load(name, where, columns=named, validation=validation)


def _pretrained(
    model: str, attention: Attention, device: str | None, advance: Callable[[str, int, int], None]
) -> "Pretrained":
    import torch

    from gtflops.recipes.models import load_pretrained

    advance("load", 0, 1)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pretrained = load_pretrained(model, attention=attention.value, device=chosen)
    advance("load", 1, 1)
    return pretrained


def _num_steps(
    steps: int | None, epochs: int | None, num_examples: int, batch_size: int, accumulate: int = 1, parts: int = 1
) -> int:
    from gtflops.recipes.batches import batches_in_epoch

    if steps is not None and epochs is not None:
        raise InputError(f"--steps is {steps} and --epochs is {epochs}; expected one of them")
    if epochs is None:
        return steps or 75
    return epochs * max(1, batches_in_epoch(num_examples, batch_size, parts) // accumulate)


def _given(options: dict[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None and value != []]


def _budget(budget: str | None, total: str | None, grid: Path | None, shares: str, energy: str | None) -> "BudgetLike":
    """What the options say, of which one may be given; kilowatt-hours, where ``energy`` is measured."""
    from gtflops.training import Auto, CarbonAware, total_of

    is_auto = budget == AUTO
    given = _given({"--budget": None if is_auto and grid is None else budget, "--total": total, "--grid": grid})
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are given; expected one of them, or --budget auto with --total")
    if total is not None:
        whole = total_of(total)
        if whole.kwh is not None and energy is None:
            raise InputError(f"--total {total!r} needs the energy to be measured; add --energy, as in --energy FRA")
        return Auto(whole) if is_auto else whole
    if is_auto:
        return Auto()
    if grid is not None:
        pairs = _pairs("shares", shares.split(","))
        return CarbonAware(grid, {_number("--shares", at): _number("--shares", share) for at, share in pairs.items()})
    numbers = [_number("--budget", text) for text in ("0.5" if budget is None else budget).split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _every(text: str) -> int | Literal["epoch"]:
    if text == "epoch":
        return "epoch"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--every is {text!r}, expected a positive number of optimizer steps, or 'epoch'")
    return int(text)


def _meter(energy: str) -> "EnergyMeter":
    from gtflops.training import EnergyMeter

    if energy.endswith(".csv"):
        return EnergyMeter(intensity=energy)
    try:
        grams = float(energy)
    except ValueError:
        return EnergyMeter(energy)
    return EnergyMeter(intensity=grams)


def _watchers(log: Path | None, tensorboard: Path | None, *, replace: bool) -> "list[Watcher]":
    from gtflops.training import JsonLines, TensorBoard

    watchers: list[Watcher] = [] if log is None else [JsonLines(log, replace=replace)]
    return watchers if tensorboard is None else [*watchers, TensorBoard(tensorboard)]


def _say_stopped(run: "FineTuneResult", steps: int, who: str = "") -> None:
    """Why a run ended early, if it did."""
    if run.log.stopped is not None:
        say = f"{who}ended after {len(run.log.steps)} of {steps} steps: {run.log.stopped}"
        err.print(say, highlight=False, markup=False, soft_wrap=True)


def _say_reasons(run: "FineTuneResult", who: str = "") -> None:
    """Why a budget that finds out by itself trained what it did, and what by a partial gradient, where that changed."""
    from gtflops.report.summary import remarks

    before: tuple[str, ...] = ()
    for record in run.log.selections:
        said = remarks(record.reason, record.partial)
        for remark in said:
            if remark not in before:
                err.print(f"{who}step {record.step}: {remark}", highlight=False, markup=False, soft_wrap=True)
        before = said


def _say_interrupted(stopped: "InterruptedRunError") -> None:
    """At which step, and how to go on."""
    if stopped.checkpoints is None:
        how = "; nothing is kept of it: --checkpoints FOLDER would keep it"
    else:
        resume = [] if "--resume" in sys.argv else ["--resume"]
        how = f", which {stopped.checkpoints} keeps; to go on:\n"
        how += shlex.join([*_launcher(), "gtflops", *sys.argv[1:], *resume])
    err.print(f"{stopped}{how}", highlight=False, markup=False, soft_wrap=True)


def _launcher() -> list[str]:
    """What started this process on each host; its ``--`` keeps torchrun from reading our --log as its own."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return [] if processes is None else ["torchrun", "--nproc-per-node", processes, "-m", "--"]


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(pairs) != len(texts):
        raise InputError(f"--{option} is {','.join(texts)!r}, expected name=value, each name once")
    return pairs


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, expected a number") from error


@app.command("advise")
def advise_command(
    model: Weights,
    data: Data = "aclsum",
    data_path: DataPath = None,
    columns: Columns = None,
    validation: ValidationFile = None,
    total: Annotated[
        str | None,
        typer.Option(help="FLOPs that the whole run may spend, as '2 PFLOP'; without it, choices are held by FLOP."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training examples, at most.", min=1)] = 3,
    batch_size: Sequences = 4,
    seq_len: Tokens = None,
    target_len: TargetLen = None,
    measure_on: Annotated[int, typer.Option(help="Batches that importance is averaged over.", min=1)] = 4,
    learning_rate: LearningRate = 5e-5,
    seed: Seed = 0,
    attention: ModelAttention = Attention.EAGER,
    device: Device = None,
    allow_unsupported: AllowUnsupported = False,
    as_json: AsJson = False,
) -> None:
    """How to spend a total of FLOPs: what each budget, reuse, LoRA, top layers and fewer full steps would bring.

    Measures importance on a few batches, each of which takes as long as a full step, and trains nothing.

    Example: gtflops advise smollm2 --data aclsum --epochs 3 --total '100 TFLOP'
    """
    from gtflops.recipes.advise import AdviceSettings, advise

    examples = _data(data, data_path, columns, validation)
    settings = AdviceSettings(
        total_flops=None if total is None else _total_flops("--total", total),
        epochs=epochs,
        batch_size=batch_size,
        seq_len=seq_len or examples.seq_len,
        target_len=target_len or examples.target_len,
        measure_on=measure_on,
        learning_rate=learning_rate,
        seed=seed,
        allow_unsupported=allow_unsupported,
    )
    with err.status(f"loading {model}") as status:
        pretrained = _pretrained(model, attention, device, lambda stage, done, of: None)
        advice = advise(pretrained, examples, settings, status.update)
    if as_json:
        _print_json(advice.to_json())
    else:
        _print_advice(advice)


def _total_flops(option: str, total: str) -> float:
    from gtflops.training import total_of

    flops = total_of(total).flops
    if flops is None:
        raise InputError(
            f"{option} is {total!r}, expected FLOPs, such as '2 PFLOP': hours and energy cannot be foreseen"
        )
    return flops


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Option("--out", help="Folder for report.html and results.json.")] = Path("demo"),
    steps: Steps = 10,
    every: Every = 5,
    budget: Budget = 0.5,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    force: Force = False,
    unit: UnitOption = Unit.FLOPS,
    as_json: AsJson = False,
) -> None:
    """SmolLM2-135M on ACLSum, full fine-tuning and under a budget, side by side.

    Example: gtflops demo --steps 20 --every 10
    """
    from gtflops.files import write_whole
    from gtflops.recipes.demo import run_demo
    from gtflops.recipes.finetune import FineTuneSettings

    _require_flops(unit, as_json)
    report, figures = folder / "report.html", folder / "results.json"
    for path in (report, figures):
        _require_free(path, force)
    _make_folder(folder)
    with _progress() as advance:
        demo = run_demo(FineTuneSettings(steps=steps, every=every, budget=budget, seed=seed), advance)
    results = _demo_json(demo)
    write_whole(figures, json.dumps(results, indent=1, allow_nan=False))
    _write_html(report, demo.profile, demo.budgeted.selection, demo.budgeted.log)
    if as_json:
        _print_json(results)
    else:
        out.print(_runs_table({"full": demo.full, f"budget {budget:g}": demo.budgeted}, unit))
        forward = format_exactly(demo.profile.step_flops("none", ops="matmul").forward, unit)
        by_fvcore = "not counted" if demo.fvcore_forward is None else format_exactly(demo.fvcore_forward, unit)
        twice = " (MACs x 2)" if unit is Unit.FLOPS else ""
        out.print(f"Forward pass, matrix products: {forward} {unit.symbol} by gtflops, {by_fvcore} by fvcore{twice}.")
        out.print(
            f"SmolLM2-135M-Instruct on ACLSum, {steps} steps of {demo.settings.batch_size} x {demo.settings.seq_len} "
            f"tokens, AdamW {demo.settings.learning_rate:g}, float32, {demo.threads} threads, seed {seed}; "
            f"Python {demo.python}, " + ", ".join(f"{name} {number}" for name, number in demo.versions.items()),
            highlight=False,
        )
    _say_written(report, figures)


# --- what is printed --------------------------------------------------------------------------------------------


def _print_wide(table: RenderableType) -> None:
    """In a pipe there is no width to keep to, and names of operators stay whole."""
    (out if out.is_terminal else Console(width=200)).print(table)


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {"operators": entry.ops, "kind": entry.kind, "formula": entry.text, "source": entry.source}


def _share_of_a_step(run: "FineTuneResult") -> str:
    """Of the first one; on average where later ones read what it stored."""
    log = run.log
    steps = log.steps if any(step.reused for step in log.steps) else log.steps[:1]
    return f"{sum(step.planned_flops for step in steps) / sum(step.full_flops for step in steps):.3f}"


def _runs_table(runs: "dict[str, FineTuneResult]", unit: Unit, *, trimmed: bool = False) -> Table:
    """Runs side by side, a column each."""
    table = Table(title=f"Fine-tuning under a budget of {unit.symbol}s", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")

    def row(label: str, cell: "Callable[[FineTuneResult], str]") -> None:
        table.add_row(label, *(cell(result) for result in runs.values()))

    row(f"planned {unit.symbol}s, all steps", lambda run: format_flops(run.log.planned_flops, unit))
    row(
        f"planned {unit.symbol}s a step, share of full",
        _share_of_a_step,
    )
    if trimmed:
        row(f"planned {unit.symbol}s, share of full steps on whole batches", lambda run: f"{run.flops_share:.3f}")
    row(f"{unit.symbol}s to measure importance", lambda run: format_flops(run.log.measuring_flops, unit))
    table.add_section()
    row("one step, planned", lambda run: format_exactly(run.counted.planned, unit))
    row("one step, executed (gtflops' table)", lambda run: format_exactly(run.counted.executed, unit))
    row("one step, planned, matrix products", lambda run: format_exactly(run.counted.planned_matmul, unit))
    row("one step, executed, by PyTorch's counter", lambda run: format_exactly(run.counted.pytorch_matmul, unit))
    table.add_section()
    row("seconds of training steps", lambda run: format_seconds(sum(step.seconds or 0 for step in run.log.steps)))
    row("seconds of selecting", lambda run: format_seconds(sum(record.seconds for record in run.log.selections)))
    energies = {id(run): run.log.energy for run in runs.values()}
    if any(energies.values()):
        row("energy and CO2, estimated", lambda run: _energy_text(energies[id(run)]))
    drops = {id(run): _drops_text(run.log) for run in runs.values()}
    if any(drops.values()):
        row("drop of the loss, predicted and real", lambda run: drops[id(run)])
    row("validation loss before", lambda run: f"{run.loss_before:.4f}")
    row("validation loss after", lambda run: f"{run.loss_after:.4f}")
    for metric in dict.fromkeys(metric for run in runs.values() for metric in run.quality):
        row(f"{_METRICS[metric]} after", lambda run, metric=metric: f"{run.quality[metric]:.1f}")  # type: ignore[misc]
    table.add_section()
    row("selected tensors", lambda run: f"{len(run.trained)} of {len(run.profile.tensors)}")
    if any(run.log.stopped for run in runs.values()):
        row("steps made before its end", lambda run: f"{len(run.log.steps)}")
    if any(run.selection is not None for run in runs.values()):
        row(
            "importance captured",
            lambda run: "all" if run.selection is None else f"{run.selection.importance_captured:.1%}",
        )
    return table


def _energy_text(energy: "Energy | None") -> str:
    return "not measured" if energy is None else f"{energy.kwh * 1000:.4g} Wh, {energy.co2_kg * 1000:.4g} g"


def _drops_text(log: "TrainingLog") -> str:
    """Over all checked steps; empty where there is none."""
    if not log.checked:
        return ""
    predicted, real = (sum(getattr(step, name) for step in log.checked) for name in ("predicted_drop", "real_drop"))
    return f"{predicted:.4g}, {real:.4g}"


_METRICS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "f1": "F1",
    "accuracy": "accuracy",
}


def _print_advice(advice: "Advice") -> None:
    """What was looked at, its dead work, a row for each choice, and what to do."""
    from gtflops.units import format_flops

    settings = advice.settings
    what = f"{advice.model} on {advice.data}: {advice.num_examples:,} examples, batches of {settings.batch_size} x "
    what += f"{settings.seq_len} tokens, {advice.num_steps:,} steps in {settings.epochs} epochs"
    what += f"; a full step is {format_flops(advice.full_flops)}"
    lines = [what, *_dead_work_lines(advice), ""]
    out.print("\n".join(lines), highlight=False, markup=False)
    total = settings.total_flops
    table = Table(
        title="What each choice brings" + ("" if total is None else f" for {format_flops(total)}"),
        title_justify="left",
        caption="Share: FLOPs of a step by a full one, with reuse on average over the epochs. Per FLOP: importance by "
        "FLOPs, everything = 1." + ("" if total is None else " Gain: importance of all steps, everything = 1."),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Choice")
    for heading in ("Share", "Importance captured", "Per FLOP", *(() if total is None else ("Steps", "Gain"))):
        table.add_column(heading, justify="right")
    for choice in advice.choices:
        under = () if total is None else (f"{choice.steps:,}", "" if choice.gain is None else f"{choice.gain:.2f}")
        table.add_row(
            choice.name + (", reuse" if choice.reuse else ""),
            f"{choice.share:.3f}",
            "not estimated" if choice.captured is None else f"{choice.captured:.1%}",
            "" if choice.per_flop is None else f"{choice.per_flop:.2f}",
            *under,
        )
    out.print(table)
    for line in (*advice.recommendation, *(f"note: {note}" for note in advice.notes)):
        out.print(line, highlight=False, markup=False)


def _dead_work_lines(advice: "Advice") -> list[str]:
    dead = advice.dead
    lines = [
        f"Dead work: {dead.padding / dead.positions:.1%} of the positions are padding, "
        f"{dead.supervised / dead.head_positions:.1%} of the head's have a label."
    ]
    shares = {"padding": dead.padding_flops, "the head at positions without a label": dead.head_flops}
    known = [f"{share:.1%} on {what}" for what, share in shares.items() if share is not None]
    both = "" if dead.flops is None else f", together {dead.flops:.1%}"
    return [*lines, f"Of a full step's FLOPs, {' and '.join(known)}{both}."] if known else lines


def _comparison_table(compared: "Comparison", unit: Unit) -> Table:
    """A row for each scheme."""
    runs = compared.runs
    settings = next(iter(compared.settings.values()))
    before = next((f", validation loss before {run.loss_before:.4f}" for run in runs.values()), "")
    memory = next((f" Memory: {run.memory.measured}." for run in runs.values() if run.memory is not None), "")
    energy = any(run.log.energy for run in runs.values())
    ended_early = any(run.log.stopped for run in runs.values())
    table = Table(
        title=f"{compared.data}, {'' if settings.until is None else 'at most '}{settings.steps} steps of "
        f"{settings.batch_size} x {settings.seq_len} tokens{before}",
        title_justify="left",
        caption=f"Share: planned {unit.symbol}s of the steps by those of full fine-tuning. Measuring: {unit.symbol}s "
        f"to measure importance, not in the share. Time: of the steps; selecting comes on top.{memory}",
        caption_justify="left",
    )
    metrics = list(dict.fromkeys(metric for run in runs.values() for metric in run.quality))
    headings = ["Planned", "Share", "Executed", "Measuring", "Time", "Selecting", "Memory", "Tensors", "Rate"]
    headings += [*(["Steps"] if ended_early else []), *(["Energy, CO2"] if energy else []), "Loss"]
    table.add_column("Scheme")
    for heading in (*headings, *(_METRICS[metric] for metric in metrics)):
        table.add_column(heading, justify="right")
    for label, run in runs.items():
        executed = run.log.executed_flops
        table.add_row(
            label,
            format_flops(run.log.planned_flops, unit),
            f"{run.flops_share:.3f}",
            "not counted"
            if executed is None
            else "equal"
            if executed == run.log.planned_flops
            else format_flops(executed, unit),
            format_flops(run.log.measuring_flops, unit),
            format_seconds(run.train_seconds),
            format_seconds(run.log.seconds - run.train_seconds),
            "" if run.memory is None else f"{run.memory.peak_bytes / 1e6:,.0f} MB",
            f"{len(run.trained)} of {len(run.profile.tensors)}",
            f"{compared.settings[label].learning_rate:g}",
            *([f"{len(run.log.steps)}"] if ended_early else []),
            *([_energy_text(run.log.energy)] if energy else []),
            f"{run.loss_after:.4f}",
            *(f"{run.quality[metric]:.1f}" for metric in metrics),
        )
    for label in compared.failed:
        table.add_row(label, "failed")
    return table


def _comparison_json(compared: "Comparison") -> dict[str, Any]:
    return {
        "data": compared.data,
        "runs": {
            label: {"learning_rate": compared.settings[label].learning_rate, **_run_json(run)}
            for label, run in compared.runs.items()
        },
        "failed": dict(compared.failed),
    }


def _run_json(run: "FineTuneResult") -> dict[str, Any]:
    from gtflops.training.watching import to_json

    return {
        "scheme": run.scheme.name,
        "trained": list(run.trained),
        "planned_flops": run.log.planned_flops,
        "executed_flops": run.log.executed_flops,
        "measuring_flops": run.log.measuring_flops,
        "full_step_flops": run.full_step_flops,
        "flops_share": run.flops_share,
        "peak_memory_bytes": None if run.memory is None else run.memory.peak_bytes,
        "peak_memory_measured": None if run.memory is None else run.memory.measured,
        "counted_step": {
            "planned": run.counted.planned,
            "executed": run.counted.executed,
            "planned_matmul": run.counted.planned_matmul,
            "pytorch_matmul": run.counted.pytorch_matmul,
        },
        "stopped": run.log.stopped,
        "energy": None if run.log.energy is None else asdict(run.log.energy),
        "drops": [
            {"step": row["step"], "predicted": row["predicted_drop"], "real": row["real_drop"]}
            for row in map(to_json, run.log.checked)
        ],
        "step_seconds": [step.seconds for step in run.log.steps],
        "select_seconds": [record.seconds for record in run.log.selections],
        "losses": [step.loss for step in run.log.steps],
        "validation_loss_before": run.loss_before,
        "validation_loss_after": run.loss_after,
        "quality": dict(run.quality),
        "selections": [
            {"step": record.step, "reason": record.reason, **record.selection.to_json()}
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
    uses: UsesChoice | None = None,
) -> "Profile":
    """A saved profile, at other sizes if some are given, or a new one of a model by name."""
    from gtflops.profiling import Profile, profile

    if not _is_saved(model):
        graph: Literal["eager", "compiled"] = "compiled" if compiled else "eager"
        with err.status(f"tracing {model}"):
            sizes = _sizes(model, batch_size, seq_len, decoder_len, attention)
            return profile(model, graph=graph, uses=None if uses is None else "separate", **sizes)
    saved = Profile.load(model)
    if attention is not None:
        raise InputError(f"{model} is a saved profile, whose attention is what it was; leave --attention out")
    if uses is not None and not saved.graph.uses:
        raise InputError(
            f"{model} holds no uses of shared tensors, expected a profile that was saved with --uses {uses.value}; "
            "profile the model again by its name"
        )
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


def _adapters(wishes: list[str], model: str) -> "Lora | None":
    """The adapters that ``wishes`` describe, if any."""
    from gtflops.recipes.adapters import LORA, Lora

    described = [wish for wish in wishes if wish.startswith(LORA)]
    if not described:
        return None
    if len(wishes) > 1:
        raise InputError(f"--trainable is {' and '.join(map(repr, wishes))}, expected adapters alone, described once")
    if _is_saved(model):
        raise InputError(
            f"{model} is a saved profile, which holds no model to put adapters on; expected a folder, a preset or an id"
        )
    return Lora.of(described[0])


def _with_adapters(model: str, lora: "Lora", sizes: dict[str, Any]) -> "tuple[Profile, Sequence[str]]":
    with err.status(f"tracing {model} with adapters"):
        from gtflops.capture import architecture
        from gtflops.recipes.adapters import lora_profile

        return lora_profile(architecture(model, **sizes), lora)


def _matching(wishes: list[str], costs: "Profile") -> list[str]:
    from gtflops.problem import matching

    mask = matching(costs.names, "--trainable", wishes)
    return [name for name, chosen in zip(costs.names, mask, strict=True) if chosen]


def _step_json(whole: "Profile", changed: "Profile", trained: Sequence[str]) -> dict[str, Any]:
    """A step that trains some tensors, and the full step."""

    def step(costs: "Profile", names: Any) -> dict[str, Any]:
        every, matmul = costs.step_flops(names), costs.step_flops(names, ops="matmul")
        parts = ("forward", "backward", "recompute", "total")
        return {part: {"all": getattr(every, part), "matmul": getattr(matmul, part)} for part in parts}

    return {"trained": trained, "flops": step(changed, trained), "full": step(whole, "all")}


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


def _require_cost(costs: "Profile", cost: CostOption, model: str) -> None:
    """Times are measured in Python, and come here in a file."""
    if cost is CostOption.TIME and costs.nanoseconds is None:
        raise InputError(
            f"--cost time needs the times of operators, and {model} has none for this batch; expected a profile that "
            "was saved with them, as gtflops.measure_time(profile, device).save('timed.json') does in Python"
        )


def _require_flops(unit: Unit, as_json: bool) -> None:
    if as_json and unit is not Unit.FLOPS:
        raise InputError(f"--json is in FLOPs, as its keys say; leave --unit {unit} out (2 FLOPs are 1 MAC)")


def _limit(budget: str) -> dict[str, Any]:
    """What ``gtflops.select`` calls a budget that was written as a share, in FLOPs, in MACs or in seconds."""
    try:
        exact, unit = quantity_of(budget)
        amount = float(exact)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"--budget is {budget!r}, expected a share of a full step, such as 0.5, or what a step may cost, such as "
            "'1.2 TFLOP' or '600 GMAC' (k, M, G, T, P, E or Z), or with --cost time '35 ms'"
        ) from error
    if unit == "FLOP":
        return {"budget_flops": int(exact)}
    return {"budget_seconds" if unit == "s" else "budget": amount}


def _elements(limit: str | None) -> int | None:
    if limit is None:
        return None
    try:
        count = count_of(limit)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(
            f"--max-elements is {limit!r}, expected a whole number from 1 on, such as 30000000, '30M' or '1.5B'"
        )
    return count


def _importance(given: str, costs: "Profile") -> dict[str, float]:
    return {tensor.name: float(tensor.numel) for tensor in costs.tensors} if given == "numel" else _read(given)


def _say_importance(given: str) -> None:
    if given == "numel":
        out.print("Importance: number of elements of each tensor, a stand-in and no measurement.")


def _read(path: str) -> dict[str, float]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read importances from {path}: {error}; expected a JSON object of numbers") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, expected a JSON object with a number for each tensor")
    return data


def _saved_selection(path: Path, costs: "Profile", importance: dict[str, float]) -> "Selection":
    """A selection from a file, if it is one of this profile and of these importances."""
    from gtflops.selection import Selection

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read a selection from {path}: {error}") from error
    try:
        selection = Selection.from_json(costs, data, importance)
        flops, full_flops, value = int(data["flops"]), int(data["full_flops"]), float(data["value"])
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, GtflopsError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} holds no selection of this profile ({reason}); expected what 'gtflops select --json' prints"
        ) from error
    here = costs.form("flops", selection.epochs_left).total(selection.mask)
    if (flops, full_flops) != (here, costs.full_flops):
        raise InputError(
            f"{path} holds a selection of {flops:,} FLOP a step, of {full_flops:,} in full; with this profile it costs "
            f"{here:,} of {costs.full_flops:,}; expected the profile that it was made with"
        )
    worth = math.fsum(importance.get(name, 0.0) for name in selection.names)
    if not math.isclose(worth, value, rel_tol=1e-9):
        raise InputError(
            f"{path} holds a selection worth {value:.6g}, which by these importances is worth {worth:.6g}; expected "
            "--importance as it was for 'gtflops select'"
        )
    return selection


def _require_free(path: Path | None, force: bool, *, is_folder: bool = False) -> None:
    """What is there already is replaced only by --force, or when a person at the terminal says so.

    Asked before the work, so that nothing of it is lost. Of a folder, what is in it. What is empty may be replaced.
    """
    if path is None or not path.exists() or not _is_first():
        return
    if path.is_dir() and not is_folder:
        raise InputError(f"{path} is a folder, expected the name of a file in it")
    is_empty = not any(path.iterdir()) if path.is_dir() else path.is_file() and not path.stat().st_size
    if force or is_empty:
        return
    state, what = ("has files", "files in it") if path.is_dir() else ("exists", "it")
    if not sys.stdin.isatty() or not typer.confirm(f"{path} {state}. Replace {what}?", err=True):
        raise InputError(f"{path} {state}; --force replaces {what}")


def _require_writable(path: Path | None, suffix: str = "") -> None:
    """An output that cannot be written is refused before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: the folder {path.parent.absolute()} is read-only")
    if path is not None and not path.name.endswith(suffix):
        raise InputError(f"{path} does not end in {suffix}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; expected a folder") from error


def _write_html(path: Path, costs: "Profile", selection: "Selection | None" = None, log: Any = None) -> None:
    from gtflops.report import write

    _require_writable(path, ".html")
    with err.status(f"writing {path}"):
        write(path, costs, selection, log)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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


def _is_first() -> bool:
    """Of the processes that torchrun started, the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line and leave with the exit code that ``gtflops --help`` documents."""
    # The notices of the libraries below would stand between ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    out.quiet = err.quiet = not _is_first()
    try:
        code = app(_debug_first(sys.argv[1:]), prog_name="gtflops", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
        sys.exit(1)
    except typer.Abort:
        err.print("[bold red]error:[/] stopped, as asked")
        sys.exit(1)
    except Exception as error:
        code = _say_error(error)
    sys.exit(code if isinstance(code, int) else 0)


def _debug_first(words: list[str]) -> list[str]:
    """``--debug`` is an option of gtflops itself, and may stand behind the name of a command as well."""
    ours = words[: words.index("--")] if "--" in words else words
    if "--debug" not in ours:
        return words
    return ["--debug", *(word for word in ours if word != "--debug"), *words[len(ours) :]]


def _say_error(error: Exception) -> int:
    """One line on stderr; the exit code. With --debug the traceback goes its way."""
    code, words = 2, f"{type(error).__name__} {error}"
    if hasattr(error, "format_message"):  # typer's, of a command line that cannot be read
        context = getattr(error, "ctx", None)
        if not error.format_message():  # nothing was asked for, and help is what there is to say
            return 2
        words = f"{error.format_message()} ({context.command_path if context else 'gtflops'} --help says what there is)"
    elif os.environ.get(DEBUG):
        raise error
    elif isinstance(error, OSError):
        words = f"{type(error).__name__} {error}"
    elif not isinstance(error, GtflopsError):
        code, words = 1, f"{type(error).__name__} {error}; gtflops did not expect this: --debug shows where"
    err.print("[bold red]error:[/]", end=" ")
    err.print(" ".join(words.splitlines()), markup=False, highlight=False, soft_wrap=True)
    return code
