"""Examples to train on and to measure with: the data of the published experiments, ACLSum, and files of one's own.

Prompts and lengths are those of METHOD's recipes; every data set becomes the same record, a :class:`DataSet`.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gtflops.errors import InputError
from gtflops.recipes.models import package_folder

Split = Literal["train", "validation", "test"]

#: How a generated text is judged: ROUGE-1/2/L; exact match and F1 against any of the answers; whether the right one of
#: the choices is the likeliest.
Metric = Literal["rouge", "answers", "choices"]

#: In a prompt, the place of the tokenizer's own end-of-sequence token (published as ``</s>``, which is OPT's).
END = "\N{END OF TEXT}"


@dataclass(frozen=True, slots=True)
class Example:
    """``source`` is cut where an example is too long; ``cue`` leads from it to ``target``, which the loss is on.

    ``answers`` are the texts that count as right (``target`` alone unless given), ``choices`` those to choose from,
    and ``where`` is the file and row, for messages.
    """

    source: str
    cue: str
    target: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class DataSet:
    """Examples by split, with the lengths that they are trained at and the metric that they are judged by.

    ``seq_len`` tokens hold prompt and target; ``target_len`` is the longest text to generate, and the length of an
    encoder-decoder's labels.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    seq_len: int
    target_len: int
    metric: Metric


def load(
    name: str,
    path: str | Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    validation: str | Path | None = None,
) -> DataSet:
    """The data set called ``name``.

    ``scitldr``, ``dialogsum``, ``webquestions`` and ``piqa`` come from the Hugging Face hub, or from ``path``: a folder
    with the data set's own files (JSON lines, CSV or Parquet, one or more a split), or one that ``save_to_disk`` wrote.
    ``aclsum`` is the package of that name. ``jsonl`` is a JSON-lines file at ``path``, of which ``columns`` says which
    column is the ``prompt`` and which the ``target``; its validation examples are those of the file ``validation``, or
    every tenth.

    Raises InputError that names what was expected for an unknown name, a folder without the files, a missing column, an
    empty row (with its file and number), and a hub that is out of reach.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        nearest = f" (nearest: {close[0]!r})" if close else ""
        raise InputError(f"there is no data set {name!r}{nearest}; expected one of {', '.join(NAMES)}, or a file")
    for given, value in (("columns", columns), ("validation", validation)):
        if value is not None and name != "jsonl":
            raise InputError(f"{given} is for the data set 'jsonl'; {name} has its own")
    if name == "aclsum":
        if path is not None:
            raise InputError(f"aclsum is the package of that name, but a path was given: {path}; leave it out")
        return DataSet(
            name, tuple(aclsum("train")), tuple(aclsum("val")), tuple(aclsum("test")), 224, 64, metric="rouge"
        )
    if name == "jsonl":
        if path is None:
            raise InputError("the data set 'jsonl' needs a path; expected a file with a JSON object a line")
        examples = jsonl(Path(path), columns)
        held_out = tuple(jsonl(Path(validation), columns)) if validation else tuple(examples[::10])
        train = examples if validation else [example for index, example in enumerate(examples) if index % 10]
        return DataSet(str(path), tuple(train), held_out, (), 224, 64, metric="rouge")
    recipe = _RECIPES[name]
    splits: dict[Split, tuple[Example, ...]] = {
        split: tuple(recipe.example(row) for row in _rows(recipe, name, path, split)) for split in recipe.splits
    }
    return DataSet(
        name,
        splits["train"],
        splits.get("validation") or splits["test"],
        splits.get("test", ()),
        recipe.seq_len,
        recipe.target_len,
        recipe.metric,
    )


def aclsum(split: Literal["train", "val", "test"]) -> list[Example]:
    """Abstracts of the ACL Anthology with a summary for each of three aspects (the package ``aclsum``)."""
    path = package_folder("aclsum", "aclsum") / "dataset" / f"{split}.jsonl"
    papers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Example(" ".join(paper["sentences"]["abstract"]), f" TL;DR ({aspect}): ", summary)
        for paper in papers
        for aspect, summary in paper["summary"].items()
    ]


def jsonl(path: Path, columns: Mapping[str, str] | None = None) -> list[Example]:
    """A file with one JSON object a line, with a text for the prompt and one, or a list of right ones, for the target.

    ``columns`` says which keys these are: ``{"prompt": "prompt", "target": "target"}`` unless given. InputError names a
    bad line.
    """
    columns = {"prompt": "prompt", "target": "target"} | dict(columns or {})
    if unknown := columns.keys() - {"prompt", "target"}:
        raise InputError(f"columns names {sorted(unknown)}, expected the columns for 'prompt' and 'target'")
    examples = []
    for row in _json_lines(path):
        row.require(columns.values())
        answers = row.texts(columns["target"])
        examples.append(Example(row.text(columns["prompt"]), "", answers[0], answers, where=row.where))
    if not examples:
        wanted = " and ".join(map(repr, columns.values()))
        raise InputError(f"{path} holds no examples, expected a JSON object with {wanted} a line")
    return examples


def _json_lines(path: Path) -> "Iterator[_Row]":
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is no JSON: {error.msg}; expected an object a line") from error
        if not isinstance(content, Mapping):
            raise InputError(f"{path}:{number} has a {type(content).__name__}, expected a JSON object")
        yield _Row(content, f"{path}:{number}")


def _csv_rows(path: Path) -> "Iterator[_Row]":
    number = 0
    try:
        for number, content in enumerate(csv.DictReader(io.StringIO(_read(path), newline=""), strict=True), start=1):
            yield _Row({str(key): value for key, value in content.items()}, f"{path} row {number}")
    except csv.Error as error:
        raise InputError(f"{path} row {number + 1} is no CSV: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a text file") from error


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a file, which says where it is when it lacks something."""

    content: Mapping[str, Any]
    where: str

    def require(self, columns: Iterable[str]) -> None:
        missing = [column for column in columns if column not in self.content]
        if missing:
            raise InputError(
                f"{self.where} has the columns {sorted(self.content)}, but not {', '.join(map(repr, missing))}"
            )

    def text(self, column: str) -> str:
        """The text in a column; sentences in a list are joined."""
        value = self.content[column]
        if isinstance(value, list) and all(isinstance(sentence, str) for sentence in value):
            value = " ".join(value)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self.where} has {value!r} in the column {column!r}, expected a text that is not empty")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """The texts in a column, at least one."""
        value = self.content[column]
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(
                f"{self.where} has {value!r} in the column {column!r}, expected a text, or a list of texts, that is "
                "not empty"
            )
        return tuple(texts)


# --- the data of the published experiments ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """``hub`` are the arguments of ``datasets.load_dataset``, ``files`` the data set's own files in words."""

    hub: Mapping[str, str]
    columns: tuple[str, ...]
    files: str
    example: Callable[[_Row], Example]
    seq_len: int
    target_len: int
    metric: Metric
    splits: tuple[Split, ...] = ("train", "validation", "test")


def _scitldr(row: _Row) -> Example:
    # Of the several summaries of a validation paper, the first counts, as in the published experiments.
    return Example(row.text("source"), " TL;DR:", f" {row.texts('target')[0]}", where=row.where)


def _dialogsum(row: _Row) -> Example:
    return Example(row.text("dialogue"), " TL;DR:", f" {row.text('summary')}", where=row.where)


def _webquestions(row: _Row) -> Example:
    answers = row.texts("answers")
    return Example(f"question:{row.text('question')}", f"{END}answer:", answers[0], answers, where=row.where)


def _piqa(row: _Row) -> Example:
    label = row.content["label"]
    if str(label) not in ("0", "1"):
        raise InputError(f"{row.where} has {label!r} in the column 'label', expected 0 or 1")
    parts = [f"{column}:{row.text(column)}" for column in ("goal", "sol1", "sol2")]
    return Example(END.join(parts), f"{END}label:", str(label), choices=("0", "1"), where=row.where)


#: Two data sets are scripts on the hub, which ``datasets`` no longer runs; the hub's own Parquet conversion is read.
_PARQUET = {"revision": "refs/convert/parquet"}

_RECIPES: dict[str, _Recipe] = {
    "scitldr": _Recipe(
        hub={"path": "allenai/scitldr", "data_dir": "Abstract", **_PARQUET},
        columns=("source", "target"),
        files="train.jsonl, dev.jsonl and test.jsonl of SciTLDR-Data/SciTLDR-A in github.com/allenai/scitldr",
        example=_scitldr,
        seq_len=512,
        target_len=64,
        metric="rouge",
    ),
    "dialogsum": _Recipe(
        hub={"path": "knkarthick/dialogsum"},
        columns=("dialogue", "summary"),
        files="train.csv, validation.csv and test.csv",
        example=_dialogsum,
        seq_len=512,
        target_len=128,
        metric="rouge",
    ),
    "webquestions": _Recipe(
        hub={"path": "stanfordnlp/web_questions"},
        columns=("question", "answers"),
        files="data/train-*.parquet and data/test-*.parquet",
        example=_webquestions,
        seq_len=160,
        target_len=64,
        metric="answers",
        splits=("train", "test"),
    ),
    "piqa": _Recipe(
        hub={"path": "ybisk/piqa", **_PARQUET},
        columns=("goal", "sol1", "sol2", "label"),
        files="train.jsonl with train-labels.lst, and dev.jsonl with dev-labels.lst",
        example=_piqa,
        seq_len=400,
        target_len=4,
        metric="choices",
        splits=("train", "validation"),  # the labels of the test split are not public
    ),
}

#: Every data set by name.
NAMES = (*_RECIPES, "aclsum", "jsonl")

#: What files of a split may be called.
_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
#: The kinds of files.
_SUFFIXES = (".jsonl", ".csv", ".parquet")


def _rows(recipe: _Recipe, name: str, path: str | Path | None, split: Split) -> Iterator[_Row]:
    if path is None:
        source = f"{recipe.hub['path']} {split}"
        tables: dict[str, Iterable[_Row]] = {source: _numbered(source, _from_hub(recipe, name, split))}
    else:
        tables = _from_folder(recipe, name, Path(path), split)
    for source, table in tables.items():
        empty = True
        for row in table:
            empty = False
            row.require(recipe.columns)
            yield row
        if empty:
            raise InputError(f"{source} holds no rows, expected some with {', '.join(recipe.columns)}")


def _numbered(source: str, table: Iterable[Mapping[str, Any]]) -> Iterator[_Row]:
    return (_Row(content, f"{source} row {number}") for number, content in enumerate(table, start=1))


def _layout(recipe: _Recipe) -> str:
    """What is expected of a local copy, in words."""
    return (
        f"{recipe.files} (or other .jsonl, .csv or .parquet files named by split), rows with the columns "
        f"{', '.join(recipe.columns)}"
    )


def _from_hub(recipe: _Recipe, name: str, split: Split) -> Iterable[Mapping[str, Any]]:
    with _datasets(name) as datasets:
        try:
            table: Iterable[Mapping[str, Any]] = datasets.load_dataset(**recipe.hub, split=split)
        except Exception as error:  # datasets has no common class of what may go wrong
            raise InputError(
                f"cannot load {recipe.hub['path']} from the Hugging Face hub ({_first_line(error)}); expected a "
                f"network, or the path of a folder with {_layout(recipe)}"
            ) from error
    return table


def _from_folder(recipe: _Recipe, name: str, folder: Path, split: Split) -> dict[str, Iterable[_Row]]:
    """The rows of a split by the file that they are in."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one for {name} with {_layout(recipe)}")
    if (folder / "dataset_dict.json").is_file():
        with _datasets(name) as datasets:
            saved = _called(f"{folder}", lambda: datasets.load_from_disk(str(folder)))
        if split not in saved:
            raise InputError(f"{folder} has the splits {', '.join(saved)}; expected {split} for {name}")
        return {f"{folder} {split}": _numbered(f"{folder} {split}", saved[split])}
    files = _files(folder, split)
    if not files:
        found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        holds = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "") if found else "nothing"
        raise InputError(
            f"{folder} holds {holds}, but no file of the split {split}; expected for {name} {_layout(recipe)}"
        )
    return {str(file): _with_labels(file, recipe, _table(name, file)) for file in files}


def _files(folder: Path, split: Split) -> list[Path]:
    """``train.csv``, ``train-00000-of-00002.parquet`` or ``train/0000.parquet``, here or in ``data``."""
    for place in (folder, folder / "data"):
        for stem in _STEMS[split]:
            files = [
                file
                for pattern in (f"{stem}.*", f"{stem}-*", f"{stem}/*")
                for file in sorted(place.glob(pattern))
                if file.suffix in _SUFFIXES
            ]
            if files:
                return files
    return []


def _table(name: str, file: Path) -> Iterable[_Row]:
    if file.suffix == ".jsonl":
        return _json_lines(file)
    if file.suffix == ".csv":
        return _csv_rows(file)
    with _datasets(name) as datasets:
        return _numbered(
            str(file),
            _called(str(file), lambda: datasets.load_dataset("parquet", data_files=str(file), split="train")),
        )


def _with_labels(file: Path, recipe: _Recipe, table: Iterable[_Row]) -> Iterable[_Row]:
    """PIQA's own files have the labels of ``dev.jsonl`` in ``dev-labels.lst``."""
    labels = file.with_name(f"{file.stem}-labels.lst")
    if "label" not in recipe.columns or not labels.is_file():
        return table
    rows, numbers = list(table), _read(labels).split()
    if len(rows) != len(numbers):
        raise InputError(f"{labels} has {len(numbers)} labels for the {len(rows)} rows of {file}; expected one a row")
    return [_Row({**row.content, "label": number}, row.where) for row, number in zip(rows, numbers, strict=True)]


@contextmanager
def _datasets(name: str) -> Iterator[Any]:
    """The package, without its progress bars."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} is read by the package datasets, which is not installed; pip install 'gtflops[recipes]'"
        ) from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        if shown:
            datasets.enable_progress_bars()


def _called(source: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # datasets has no common class of what may be wrong with a file
        raise InputError(f"cannot read {source}: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
