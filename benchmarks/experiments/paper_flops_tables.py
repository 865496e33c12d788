"""Tables of what ``paper_flops.py`` measured."""

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from experiments.provenance import described
from gtflops.units import FLOPS_PER_MAC
from markdown_table import marked, table

#: What ``paper_flops.py`` writes.
RAW = Path(__file__).parent / "results" / "paper_flops.json"

#: PFLOPs as they were published for OPT-2.7B (arXiv:2309.13192); a FLOP is a multiply-add there.
PUBLISHED = {
    "SciTLDR": {
        "full": 41.8,
        "lora": 27.9,
        "GT-0.36": 14.9,
        "GT-0.4": 16.6,
        "GT-0.5": 20.8,
        "GT-0.6": 25.0,
        "GT-0.7": 29.2,
        "GT-0.8": 33.4,
    },
    "WebQuestions": {"lora": 16.0, "GT-0.5": 12.0, "GT-0.6": 14.0},
    "PIQA": {"lora": 174.0, "GT-0.5": 130.5},
}
OF = "OPT-2.7B"
#: How far from a published figure is still it.
TOLERANCE = 0.02

SCHEMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "prefix": "prefix tuning",
    "top2": "top two blocks",
    "bitfit": "BitFit",
}

INTRODUCTION = """
Steps are training examples x {epochs} epochs / {batch_size} examples; a last batch that is not full counts in
proportion. Every example has the recipe's length, padding included, as in the published runs. PMAC is 1e15
multiply-adds, of 2 FLOPs each: what was published as PFLOPs. *All operators* is what gtflops prices a step at, and what
budgets are shares of; *matrix products* leaves out all else, as the published figures do, which are held against it.
LoRA, prefix tuning, the top two blocks and BitFit are those of `gtflops compare`.

GT rows are the exact costs of the selection that gtflops makes within the budget. There were no weights of these
models, so that **importances are {importance}**: proportional to the square root of a tensor's number of
elements, times noise. Which tensors are trained depends on them; what a row costs hardly does: the selections use
{least:.1%} to {most:.1%} of their budgets, and all but {below} of {number} use more than 99 %.
"""

PUBLISHED_BESIDE = """
### Beside the published figures, {model}

{near} of {number} figures are within {tolerance:.0%} of the matrix products that are executed; the farthest is
{farthest}, {difference:+.1%}. A budget is what a step may cost: the last two columns say how much of it is used, by
matrix products.

"""

WEBQUESTIONS = """
The figures for WebQuestions are whole PFLOPs, and GT-0.6 is 7/6 of GT-0.5, of whose budget it has 6/5: no count of
operators gives both to selections that use their budgets. Cut to whole PFLOPs, matrix products here are {whole},
as published.
"""

LORA = """
### What LoRA executes, and what was published

{model}, PMAC of a run. Two thirds of a full run and the adapters' own products come to {formula:.2f} on SciTLDR,
which is the published figure to its last digit; they count a backward pass without weight gradients as one forward
pass. For the two products of attention in a forward pass (scores, and values weighted by them) a backward pass has
four, all of them activation gradients, which LoRA pays. What it does not pay stands below the lowest adapters:
gradients of the input of the lowest block's projections, and of its keys.

"""

TABLES = """
### Every model

PMAC of a run: all operators, matrix products (share of a full run, all operators). *With reuse*, activations below the
trained tensors are stored in the first of {epochs} epochs and read in the others: the mean of all epochs, the first
included. A scheme without such a row trains something in or below the lowest block, so that nothing can be reused.
Where a budget is infeasible, the least that is feasible is named: the forward pass, and the way to the tensor that is
the cheapest to reach.

PEFT's prefixes stand in front of the keys and values of an encoder-decoder's decoder, so that no gradient goes through
the encoder. With reuse, the blocks of an encoder-decoder's encoder alone are left out: what its decoder is given is
made of labels, padded to the longest of the batch.
"""

LIKENESS = """
### How far the synthetic importances are from measured ones

{model}, where importances were measured (`benchmarks/measure_importances.py`), and others drawn for
it as above. Their correlation is {correlation:.2f}. Shares of all importance:

"""

Row = Mapping[str, Any]


def section() -> str:
    """Everything, or ``""`` where nothing was measured."""
    if not RAW.exists():
        return ""
    raw = json.loads(RAW.read_text(encoding="utf-8"))
    recipe, rows = raw["recipe"], raw["rows"]
    runs = [{**row, "run": of_a_run(row, recipe), "label": label(row)} for row in rows]
    return (
        "## FLOPs of the published runs\n\n"
        + marked("published", described(raw["provenance"]) + "\n" + introduction(runs, recipe) + beside_published(runs))
        + lora_account(runs, recipe)
        + TABLES.format(epochs=recipe["epochs"])
        + "".join(of_model(model, runs) for model in unique(row["model"] for row in rows))
        + likeness(raw["likeness"])
    )


def introduction(runs: list[dict[str, Any]], recipe: Row) -> str:
    full = {(run["model"], run["dataset"]): run["run"]["all"] for run in runs if run["label"] == "full"}
    used = [
        float(run["run"]["all"] / full[run["model"], run["dataset"]]) / run["budget"]
        for run in runs
        if "budget" in run and run["run"]
    ]
    below = sum(share <= 0.99 for share in used)
    return INTRODUCTION.format(**recipe, least=min(used), most=max(used), below=below, number=len(used))


def of_a_run(row: Row, recipe: Row) -> dict[str, Fraction]:
    """PMAC of a whole run, by which operators are counted; empty where the row has no cost."""
    return {
        ops: petamacs(
            row[ops]["forward"] + row[ops]["backward"] + Fraction(row[ops]["stored"], recipe["epochs"]), row, recipe
        )
        for ops in ("all", "matmul")
        if ops in row
    }


def petamacs(step: int | Fraction, row: Row, recipe: Row) -> Fraction:
    """Of all steps of a run, by the FLOPs of one."""
    return Fraction(step) * steps(row, recipe) / FLOPS_PER_MAC / 10**15


def steps(row: Row, recipe: Row) -> Fraction:
    return Fraction(row["examples"] * recipe["epochs"], recipe["batch_size"])


def label(row: Row) -> str:
    return f"GT-{row['budget']:g}" if "budget" in row else str(row["scheme"])


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# --- beside what was published ----------------------------------------------------------------------------------------


def beside_published(runs: list[dict[str, Any]]) -> str:
    ours = {(run["dataset"], run["label"]): run for run in runs if run["model"] == OF and not run["reuse"]}
    rows, differences = [], {}
    for dataset, figures in PUBLISHED.items():
        for name, published in figures.items():
            run = ours[dataset, name]
            away = {ops: float(cost / Fraction(published) - 1) for ops, cost in run["run"].items()}
            title = SCHEMES.get(name, name)
            differences[f"{title} on {dataset}"] = away["matmul"]
            row = [dataset, title, f"{published:.1f}"]
            row += [text for ops in ("matmul", "all") for text in (digits(run["run"][ops]), f"{away[ops]:+.1%}")]
            if "budget" in run:
                allowed = run["budget"] * float(ours[dataset, "full"]["run"]["matmul"])
                row += [f"{float(cost) / allowed:.1%}" for cost in (published, run["run"]["matmul"])]
            rows.append([*row, *[""] * (9 - len(row))])
    farthest = max(differences, key=lambda name: abs(differences[name]))
    head = PUBLISHED_BESIDE.format(
        model=OF,
        near=sum(abs(difference) <= TOLERANCE for difference in differences.values()),
        number=len(differences),
        tolerance=TOLERANCE,
        farthest=farthest,
        difference=differences[farthest],
    )
    titles = (
        "data set | scheme | published, PFLOPs | matrix products, PMAC | difference | all operators, PMAC | "
        "difference | of its budget: published | here"
    )
    whole = ", ".join(str(int(ours["WebQuestions", name]["run"]["matmul"])) for name in PUBLISHED["WebQuestions"])
    return head + table(titles, rows) + WEBQUESTIONS.format(whole=whole)


def lora_account(runs: list[dict[str, Any]], recipe: Row) -> str:
    columns, sums = [], {}
    for dataset, published in PUBLISHED.items():
        full, lora = (
            next(
                run
                for run in runs
                if (run["model"], run["dataset"], run["label"], run["reuse"]) == (OF, dataset, name, None)
            )
            for name in ("full", "lora")
        )
        terms = account(full["matmul"], lora["products"])
        costs = [petamacs(flops, lora, recipe) for flops in terms.values()]
        assert sum(costs) == lora["run"]["matmul"]
        sums[dataset] = costs[0] + costs[1]
        columns.append([*(digits(cost) for cost in (*costs, sum(costs, Fraction(0)))), f"{published['lora']:.1f}"])
    titles = [*terms, "executed", "published"]
    return LORA.format(model=OF, formula=float(sums["SciTLDR"])) + table(
        "matrix products | " + " | ".join(PUBLISHED),
        ([title, *cells] for title, *cells in zip(titles, *columns, strict=True)),
    )


def account(full: Mapping[str, int], lora: Mapping[str, Mapping[str, int]]) -> dict[str, int | Fraction]:
    """FLOPs of a LoRA step as a sum: what the published figure has of it, and what it has not."""
    attention, adapters, everything = lora["attention"], lora["adapters"], lora["all"]
    linear = {phase: everything[phase] - attention[phase] - adapters[phase] for phase in ("forward", "backward")}
    return {
        "two thirds of a full run": Fraction(2, 3) * (full["forward"] + full["backward"]),
        "adapters, forward and backward": adapters["forward"] + adapters["backward"],
        "attention, backward beyond one forward pass": attention["backward"] - attention["forward"],
        "frozen weights, backward beyond one forward pass": linear["backward"] - linear["forward"],
    }


# --- every model ------------------------------------------------------------------------------------------------------


def of_model(model: str, runs: list[dict[str, Any]]) -> str:
    own = [run for run in runs if run["model"] == model]
    datasets = unique(run["dataset"] for run in own)
    full = {run["dataset"]: run["run"]["all"] for run in own if run["label"] == "full"}
    lines = []
    for reuse in (None, "prefix"):
        for name in unique(run["label"] for run in own):
            of_scheme = {run["dataset"]: run for run in own if (run["label"], run["reuse"]) == (name, reuse)}
            if reuse and not any(run.get("blocks") for run in of_scheme.values()):
                continue
            title = SCHEMES.get(name, name) + (", with reuse" if reuse else "")
            lines.append([title, *(cell(of_scheme[dataset], full[dataset]) for dataset in datasets)])
    heads = [f"{run['dataset']}, {run['examples']:,} x {lengths(run)}" for run in own if run["label"] == "full"]
    reasons = unique(f"\n{SCHEMES[run['label']]}: {run['not_priced']}.\n" for run in own if "not_priced" in run)
    return f"\n**{model}**\n\n" + table("scheme | " + " | ".join(unique(heads)), lines) + "".join(reasons)


def lengths(row: Row) -> str:
    return f"{row['seq_len']}" + (f", labels {row['decoder_len']}" if row["decoder_len"] else "")


def cell(run: Row, full: Fraction) -> str:
    if "not_priced" in run:
        return "not priced"
    if "least" in run:
        return f"infeasible, least {run['least'] / run['full']:.1%}"
    share = float(run["run"]["all"] / full)
    return f"{digits(run['run']['all'])}, {digits(run['run']['matmul'])} ({share:.1%})"


def digits(petamacs: Fraction) -> str:
    return f"{float(petamacs):.2f}" if abs(petamacs) < 100 else f"{float(petamacs):.1f}"


def likeness(raw: Row) -> str:
    shares = raw["shares"]
    kinds = list(shares["measured"])
    return LIKENESS.format(**raw) + table(
        "importances | " + " | ".join(kinds),
        ([name, *(f"{own[kind]:.0%}" for kind in kinds)] for name, own in shares.items()),
    )
