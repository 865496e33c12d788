"""What a run was begun with, kept beside its checkpoints, so that it goes on with the same and nothing else."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gtflops.errors import InputError, SavedFileError
from gtflops.files import write_whole
from gtflops.reuse.digests import bytes_of, header_of

_FILE = "begun-with.json"


def write_beginning(folder: Path, options: Mapping[str, object]) -> None:
    """Keep what a run is begun with, by the names of the options, in the folder of its checkpoints."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavedFileError(f"cannot write the checkpoints into {folder}: {error}; choose another folder") from error
    write_whole(folder / _FILE, json.dumps(_texts(options), indent=1) + "\n")


def require_as_begun(folder: Path, options: Mapping[str, object]) -> None:
    """InputError where the run in ``folder`` was begun with other options: which, what they were and what they are."""
    path = folder / _FILE
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")).items())
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no {_FILE}, so that there is no run to go on with; expected the folder that "
            "'gtflops train --checkpoints' wrote, or to start anew without --resume"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise SavedFileError(
            f"{path} is damaged: {error}; expected what 'gtflops train --checkpoints' wrote"
        ) from error
    now = _texts(options)
    different = [
        f"{name} was {begun.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in dict.fromkeys((*now, *begun))
        if begun.get(name) != now.get(name)
    ]
    if different:
        raise InputError(
            f"the run in {folder} was begun with other options: {'; '.join(different)}; expected them as they were, "
            "since the rest of the run would be of neither; to train with these, leave --resume out and take another "
            "folder"
        )


def digest_of_weights(model: torch.nn.Module) -> str:
    """Of names, shapes and every bit; it does not depend on where the model lies, on disk or on a device."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(header_of(name, tensor))
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:12]


def digest_of_texts(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def _texts(options: Mapping[str, object]) -> dict[str, str]:
    return {
        name: getattr(value, "__qualname__", None) or str(value)  # the address of a function is another in each process
        for name, value in options.items()
    }
