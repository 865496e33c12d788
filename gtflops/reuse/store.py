"""Activations of examples on the disk: found by what they were computed from, and checked each time they are read."""

import os
import shutil
import time
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from gtflops.errors import InputError
from gtflops.reuse.digests import bytes_of, header_of

#: A folder of the store for what is being written, so that what a killed process left is found without a search.
_UNFINISHED = ".unfinished"
#: Seconds after which nobody is still writing one entry.
_LEFT_BEHIND = 3600.0
#: Entries written between two countings of the whole folder: other processes write into it, and people delete from it.
_COUNTED_EVERY = 64


class Key(NamedTuple):
    """Which activations: ``prefix`` is the digest of all that computes them, ``example`` that of what goes in."""

    prefix: str
    example: str


class ActivationStore:
    """A folder of activations, one file for each :class:`Key`.

    An entry is written whole or not at all, so that any number of processes may write into one folder, the same entry
    too. Its checksum and its key are verified each time it is read: one that is damaged, or is not of this key, is not
    removed, and is counted in ``rejected`` by its reason. A disk that takes no more, or ``max_bytes`` reached, is one
    warning, after which nothing more is written; what is there is still read.

    ``max_bytes`` limits the whole folder, what other processes and earlier runs wrote included; each process that
    writes at the same time may exceed it by 64 entries.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = ActivationStore(folder)
    ...     key = Key(prefix="a1", example="b2")
    ...     store.write(key, {"model.layers.3": torch.arange(3.0)})
    ...     found, missing = store.read(key), store.read(Key("a1", "c3"))
    >>> found, missing
    ({'model.layers.3': tensor([0., 1., 2.])}, None)
    """

    def __init__(self, folder: str | Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InputError(f"max_bytes is {max_bytes!r}, expected a positive number of bytes, or None for no limit")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        #: Bytes of files that this object read and wrote.
        self.bytes_read = 0
        self.bytes_written = 0
        #: Entries that were there and were not used, by the reason.
        self.rejected: Counter[str] = Counter()
        #: Why nothing more is written, if so.
        self.full: str | None = None
        self._has_made_room = False
        self._size = 0
        self._written_since_counting = _COUNTED_EVERY
        try:
            (self.folder / _UNFINISHED).mkdir(parents=True, exist_ok=True)
            self._remove_left_behind()
        except OSError as error:
            raise InputError(
                f"cannot keep activations in {self.folder}: {error.strerror}; expected a folder that can be written to"
            ) from error

    def __contains__(self, key: Key) -> bool:
        """Whether there is a file for the key; whether it can be used shows when it is read."""
        return self._path(key).exists()

    def read(self, key: Key) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry, on the CPU, mapped from the file; None where there is none that can be used."""
        path = self._path(key)
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            size = path.stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            self._reject(path, "unreadable")
            return None
        if header.get("key") != "/".join(key):
            self._reject(path, "of another prefix or example")
            return None
        if header.get("checksum") != _checksum(tensors):
            self._reject(path, "changed since it was written")
            return None
        self.bytes_read += size
        return tensors

    def write(
        self, key: Key, tensors: Mapping[str, torch.Tensor], *, instead_of_others: Container[str] | None = None
    ) -> None:
        """Write an entry, in the place of one that is there; not where there is no room.

        Where ``max_bytes`` leaves none, entries of prefixes other than ``instead_of_others`` make room, once.
        """
        if self.full is not None:
            return
        kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(kept, {"key": "/".join(key), "checksum": _checksum(kept)})
        if instead_of_others is not None and not self._has_made_room and not self._has_room(len(content)):
            self._has_made_room = True
            self.remove_all_but(instead_of_others)
        if not self._has_room(len(content)):
            self._stop(f"it holds {self._size} bytes of max_bytes={self.max_bytes}, and the next entry {len(content)}")
            return
        path = self._path(key)
        unfinished = self.folder / _UNFINISHED / uuid.uuid4().hex
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not brought to the disk by fsync, which would take longer than computing: what a power cut leaves of a
            # file is found by its checksum.
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            self._stop(f"{error.strerror} ({path})")
            return
        self.bytes_written += len(content)
        self._size += len(content)
        self._written_since_counting += 1

    def remove_all_but(self, prefixes: Container[str]) -> None:
        """Remove the entries of all other prefixes, and write again if that was for want of room."""
        for folder in self.folder.iterdir():
            if folder.name != _UNFINISHED and folder.name not in prefixes:
                shutil.rmtree(folder, ignore_errors=True)
        self.full = None
        self._written_since_counting = _COUNTED_EVERY

    def make_room_again(self) -> None:
        """Write again where there was no room, and let the next entry without any take that of other prefixes."""
        self.full = None
        self._has_made_room = False

    def _reject(self, path: Path, reason: str) -> None:
        self.rejected[reason] += 1
        with suppress(OSError):
            path.unlink()

    def _path(self, key: Key) -> Path:
        # Folders of a 256th of the examples: many file systems are slow with a million files in one.
        return self.folder / key.prefix / key.example[:2] / f"{key.example}.safetensors"

    def _has_room(self, size: int) -> bool:
        if self.max_bytes is None:
            return True
        if self._written_since_counting >= _COUNTED_EVERY:
            self._size = _size_of(self.folder)
            self._written_since_counting = 0
        return self._size + size <= self.max_bytes

    def _stop(self, reason: str) -> None:
        self.full = reason
        warnings.warn(
            f"{self.folder} takes no more activations: {reason}; examples that are not in it are computed each time. "
            "Expected more room, a larger max_bytes, or an empty folder",
            stacklevel=3,
        )

    def _remove_left_behind(self) -> None:
        for path in (self.folder / _UNFINISHED).iterdir():
            try:
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # its process has just finished it, or another one removed it
                continue


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and contents. It finds accidents, in less than half the time of a secure hash."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(header_of(name, tensors[name]), value))
    return f"{value:08x}"


def _size_of(folder: Path) -> int:
    """Bytes of all files in the folder, those that are being written included."""
    total = 0
    try:
        with os.scandir(folder) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    total += _size_of(Path(item.path))
                else:
                    total += item.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # removed meanwhile
        return total
    return total
