"""The documents are run: every block of Python and every command in them, in order, as a reader would.

The blocks of a document share their names, so a document is one test. Commands run on a small model and few rows in the
place of what they name.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from markdown_it import MarkdownIt

import gtflops
from small_models import build, padded_batch
from small_tokenizer import save_llama

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

#: What runs here, by the language of a block, and what only shows something.
PYTHON, SHELL, SHOWN = {"python"}, {"console", "sh"}, {"text", "cmake"}
#: Pages that exist only in the built documentation.
GENERATED = {"operators.md"}
#: Names that stand for a model too large for a test.
LARGE = re.compile(r"facebook/opt-[\w.]+|google/flan-t5-\w+|HuggingFaceTB/[\w.-]+|\bsmollm2\b(?!\.json)")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str


def blocks_of(document: Path) -> list[Block]:
    """The fenced blocks, wherever they stand in the document."""
    tokens = MarkdownIt().parse(document.read_text(encoding="utf-8"))
    return [Block(token.map[0] + 1, token.info.strip(), token.content) for token in tokens if token.type == "fence"]


def commands_of(block: Block) -> list[str]:
    """What stands behind the prompts; all of a block that has none."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        return lines
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


# --- what fragments take as given ---------------------------------------------------------------------------------


def _model() -> dict[str, Any]:
    model, batch = build("llama"), padded_batch()
    return {"model": model, "batch": batch, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}


def _backward_pass() -> dict[str, Any]:
    given = _model()
    loss = given["model"](**given["batch"]).loss
    return {**given, "loss": loss, "gtflops": gtflops, "torch": torch, "warnings": warnings}


def _rank() -> dict[str, Any]:
    return {**_model(), "batches_of_this_rank": [padded_batch(), padded_batch()]}


def _accelerated() -> dict[str, Any]:
    from accelerate import Accelerator

    return {**_model(), "accelerator": Accelerator(cpu=True), "steps": [[padded_batch()], [padded_batch()]]}


#: For the blocks of Python of a document, in order; the others start from nothing.
GIVEN: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "importance.md": [_backward_pass],
    "distributed.md": [_rank, _accelerated],
}


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A document that starts a process group gets one of this process, on the CPU."""
    start, store = dist.init_process_group, dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda _: start("gloo", store=store, rank=0, world_size=1))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with weights and a word tokenizer, in a folder."""
    return save_llama(tmp_path_factory.mktemp("small"))


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
@pytest.mark.usefixtures("_one_process")
def test_a_document_runs(name: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = iter(GIVEN.get(name, []))
    names: dict[str, Any] = {}
    for block in blocks_of(DOCS / name):
        if block.language in PYTHON:
            names.update(next(given, dict)())
            exec(compile(block.code, f"{name}, line {block.line}", "exec"), names)
        elif block.language in SHELL:
            for command in commands_of(block):
                run(command, small)


def test_the_commands_of_the_readme_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [command for block in blocks_of(ROOT / "README.md") for command in commands_of(block)]
    mine = [command for command in commands if command.startswith("gtflops ")]
    assert len(mine) > 5
    for command in mine:
        run(command, small)


def run(command: str, small: Path) -> None:
    """The command in a shell, on a small model and little data."""
    Path("small").unlink(missing_ok=True)
    Path("small").symlink_to(small)
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": "what it costs", "target": "a model learns"}) + "\n" for _ in range(24))
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", shrunk(command)],
        env={**os.environ, "PATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def shrunk(command: str) -> str:
    """The command on the small model and few rows, with all its options."""
    command = LARGE.sub("small", command).replace("aclsum", "pairs.jsonl")
    needs_data = re.match(r"gtflops (train|compare|advise)\b", command) and "--data" not in command
    return f"{command} --data pairs.jsonl" if needs_data else command


def test_every_block_says_what_it_is() -> None:
    for document in (ROOT / "README.md", *DOCS.glob("*.md")):
        for block in blocks_of(document):
            assert block.language in PYTHON | SHELL | SHOWN, f"{document.name}, line {block.line}: {block.language!r}"


def test_links_lead_to_files() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).is_file() or target in GENERATED, (document.name, target)
