"""Checkpoints of a run: written whole or not at all, checked before anything of them is used, no code in them."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from gtflops.errors import InputError, SavedFileError

FORMAT_VERSION = 2
#: Complete checkpoints that stay: the last, and the one before it.
KEPT = 2

_WEIGHTS, _STATES, _PROGRESS = "model.safetensors", "states.pt", "progress.json"
#: Digests of the others, in the format of the command ``sha256sum``.
_SUMS = "SHA256SUMS"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds besides weights: ``states`` of objects with tensors in them, ``progress`` as plain data.

    Of a checkpoint that was read, every file is the one that was written.
    """

    path: Path
    states: Mapping[str, Any]
    progress: Mapping[str, Any]


def write(
    folder: Path, step: int, model: torch.nn.Module, states: Mapping[str, Any], progress: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-...``, and remove all but the last :data:`KEPT` checkpoints.

    The files are written into a folder of another name, brought to the disk, and renamed: a process that is killed, or
    a disk that is full, leaves the checkpoints that were there. SavedFileError where the disk does not take it.
    """
    final = folder / _name(step)
    unfinished = folder / f"{_UNFINISHED}{final.name}-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        safetensors.torch.save_model(model, str(unfinished / _WEIGHTS))
        torch.save(dict(states), unfinished / _STATES)
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "model": _layout(model),
            "progress": dict(progress),
        }
        (unfinished / _PROGRESS).write_text(json.dumps(content), encoding="utf-8")
        sums = [f"{_digest(unfinished / name)}  {name}\n" for name in (_WEIGHTS, _STATES, _PROGRESS)]
        (unfinished / _SUMS).write_text("".join(sums), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _bring_to_disk(path)
        if final.exists():  # a run that went back to an earlier checkpoint comes by here again
            _remove(final)
        unfinished.rename(final)
        _bring_to_disk(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SavedFileError(
            f"cannot write the checkpoint {final}: {error}; the checkpoints before it are as they were: make room, or "
            "choose another folder, and resume from the last of them"
        ) from error
    for old in _complete(folder)[:-KEPT]:
        _remove(old)
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def require_room(folder: Path, step: int) -> None:
    """For a run that has made ``step`` steps: SavedFileError where there is no such folder and none can be made, and
    InputError where it holds checkpoints of later steps, beside which those of the run would not stay."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavedFileError(f"cannot write the checkpoints into {folder}: {error}; choose another folder") from error
    later = [path.name for path in _complete(folder) if path.name > _name(step)]
    if later:
        raise InputError(
            f"{folder} holds {later[-1]}, a checkpoint of another run; expected resume=True to go on with it, or "
            "another folder"
        )


def read_last(
    folder: Path,
    model: torch.nn.Module,
    require: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], None] | None = None,
) -> Checkpoint:
    """Read the last checkpoint of ``folder`` and load its weights into ``model``.

    InputError where there is none, or it is of another model; SavedFileError where it is damaged; whatever
    ``require(path, states, progress)`` raises. The model is then as it was.
    """
    complete = _complete(folder)
    if not complete:
        raise InputError(
            f"{folder} holds no checkpoint, expected a folder that fit(checkpoints=...) wrote; to start anew, leave "
            "resume out"
        )
    path = complete[-1]
    others = f"remove it to resume from {complete[-2].name}" if len(complete) > 1 else "there is none before it"
    try:
        lines = (path / _SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        damaged = [name for name in (_WEIGHTS, _STATES, _PROGRESS) if sums.get(name) != _digest(path / name)]
        content = {} if damaged else json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedFileError(f"the checkpoint {path} is damaged: {error}; {others}") from error
    if damaged:
        raise SavedFileError(f"the checkpoint {path} is damaged: {' and '.join(damaged)} changed; {others}")
    if content["format_version"] != FORMAT_VERSION:
        raise SavedFileError(
            f"the checkpoint {path} has format version {content['format_version']!r}, expected {FORMAT_VERSION}: "
            "it was written by another version of gtflops"
        )
    here, there = _layout(model), content["model"]
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if different:
        name = different[0]
        raise InputError(
            f"the checkpoint {path} is of another model: {len(different)} tensors differ, first {name!r}, which is "
            f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        )
    states = torch.load(path / _STATES, weights_only=True, map_location="cpu")
    if require is not None:
        require(path, states, content["progress"])
    safetensors.torch.load_model(model, str(path / _WEIGHTS))
    return Checkpoint(path, states, content["progress"])


def random_states() -> dict[str, Any]:
    """The states of every global random generator: Python's, NumPy's, PyTorch's."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _layout(model: torch.nn.Module) -> dict[str, list[Any]]:
    return {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in model.state_dict().items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bring_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """By way of another name, so that what is left of it in a process that is killed is no checkpoint."""
    hidden = path.with_name(f"{_UNFINISHED}{path.name}-removed-{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
