"""Writes the page of the operator table when the documentation is built, from the table itself (a hook of mkdocs)."""

from itertools import groupby

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from gtflops.operators import TABLE, Entry

HEAD = """# The operator table

{count} operators have a price. In a formula, `x` is the number of elements that go in (of the first tensor), `y` the
number that come out; an operator that makes several gradients is priced by those that are asked for. Of matrix
products, convolutions, attention and recurrent layers, what stands before "other" is the column `ops="matmul"`; all the
rest is the other column. Written from the table when this page was built; `gtflops ops` prints it, `gtflops ops --model
google/flan-t5-small` what a model uses of it, and [`register_flops`](api.md#gtflops.operators.register_flops) adds to
it.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that lie in the folder."""
    files.append(File.generated(config, "operators.md", content=page()))
    return files


def page() -> str:
    """The table as Markdown, a section for each class of operators."""
    text = HEAD.format(count=sum(len(entry.ops) for entry in TABLE))
    for kind, entries in groupby(sorted(TABLE, key=lambda entry: entry.kind), key=lambda entry: entry.kind):
        text += f"\n## {kind.capitalize()}\n\n| operators | FLOPs | source |\n|---|---|---|\n"
        text += "".join(_row(entry) for entry in entries)
    return text


def _row(entry: Entry) -> str:
    operators = ", ".join(f"`{op.removeprefix('aten.')}`" for op in entry.ops)
    return f"| {operators} | {_cell(entry.text)} | {_cell(entry.source)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
