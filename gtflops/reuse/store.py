"""Activations of examples on the disk: found by what they were computed from, and checked each time they are read."""

import os
import re
import time
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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
#: What the store calls its own: nothing else in the folder is counted or removed.
_DIGEST = re.compile("[0-9a-f]{64}")
_PART = re.compile("[0-9a-f]{2}")
_ENTRY = re.compile(rf"{_DIGEST.pattern}\.safetensors")
_BEING_WRITTEN = re.compile("[0-9a-f]{32}")


class Key(NamedTuple):
    """Which activations: ``prefix`` is the digest of all that computes them, ``example`` that of what goes in; both of
    64 hexadecimal digits."""

    prefix: str
    example: str


class ActivationStore:
    """A folder of activations, one file for each :class:`Key`.

    An entry is written whole or not at all, so that any number of processes may write into one folder, the same entry
    too. Its checksum and its key are verified each time it is read: one that is damaged, or is not of this key, is
    removed, and is counted in ``rejected`` by its reason. A disk that takes no more, a part of the folder that this
    process may not write to, or ``max_bytes`` reached, is one warning, after which nothing more is written; what is
    there and may be read is still read.

    ``max_bytes`` limits all entries in the folder, those of other processes and earlier runs included; each process
    that writes at the same time may exceed it by 64 entries. Files that no store made are neither counted nor removed.
    Without it, entries that nothing reads any more, of a boundary or of weights that a run has left, stay until
    :meth:`remove_all_but` or deleting the folder: another process, or this run resumed from an earlier checkpoint, may
    want them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = ActivationStore(folder)
    ...     key = Key(prefix=64 * "a", example=64 * "1")
    ...     store.write(key, {"model.layers.3": torch.arange(3.0)})
    ...     found, missing = store.read(key), store.read(Key(64 * "a", 64 * "2"))
    >>> found, missing
    ({'model.layers.3': tensor([0., 1., 2.])}, None)
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InputError(f"max_bytes is {max_bytes!r}, expected a positive number of bytes, or None for no limit")
        self.folder = _folder(folder)
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
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"cannot keep activations in {str(self.folder)!r}: {reason}; expected a folder that can be written to"
            ) from error

    def __contains__(self, key: Key) -> bool:
        """Whether there is a file for the key that may be seen; whether it can be used shows when it is read."""
        return os.path.exists(self._path(key))  # Path.exists raises where a folder of another user's cannot be searched

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
        """Remove the entries of all other prefixes, and write again if that was for want of room.

        Files that no store made stay, also beside entries. Another process that was to read what is removed computes it
        again.
        """
        for prefix, entries in self._entries():
            if prefix in prefixes:
                continue
            for entry in entries:
                with suppress(OSError):  # it is removed already, or may not be
                    os.unlink(entry)
            for folder in (*{os.path.dirname(entry.path) for entry in entries}, str(self.folder / prefix)):
                with suppress(OSError):  # it holds something else
                    os.rmdir(folder)
        self.full = None
        self._written_since_counting = _COUNTED_EVERY

    def make_room_again(self) -> None:
        """Write again where there was no room, and let the next entry without any take that of other prefixes."""
        self.full = None
        self._has_made_room = False

    def _reject(self, path: Path, reason: str) -> None:
        self.rejected[reason] += 1
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if self.full is None:
                self._stop(f"{error.strerror} ({path})")

    def _entries(self) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """The files of each prefix that a store wrote, by their names; links are none."""
        for prefix in _listed(self.folder):
            if _DIGEST.fullmatch(prefix.name) and prefix.is_dir(follow_symlinks=False):
                parts = (part for part in _listed(prefix) if _PART.fullmatch(part.name))
                yield (
                    prefix.name,
                    [
                        entry
                        for part in parts
                        if part.is_dir(follow_symlinks=False)
                        for entry in _listed(part)
                        if _ENTRY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                    ],
                )

    def _being_written(self) -> list[os.DirEntry[str]]:
        """What this or another process is writing, or was killed while it wrote."""
        listed = _listed(self.folder / _UNFINISHED)
        return [file for file in listed if _BEING_WRITTEN.fullmatch(file.name) and file.is_file(follow_symlinks=False)]

    def _path(self, key: Key) -> Path:
        if not all(map(_DIGEST.fullmatch, key)):
            raise InputError(f"{key} is not the key of an entry, expected two digests of 64 hexadecimal digits")
        # Folders of a 256th of the examples: many file systems are slow with a million files in one.
        return self.folder / key.prefix / key.example[:2] / f"{key.example}.safetensors"

    def _has_room(self, size: int) -> bool:
        if self.max_bytes is None:
            return True
        if self._written_since_counting >= _COUNTED_EVERY:
            files = [*self._being_written(), *(entry for _, entries in self._entries() for entry in entries)]
            self._size = sum(map(_size_of, files))
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
        for file in self._being_written():
            with suppress(OSError):  # its process has just finished it, or it is another user's
                if time.time() - file.stat().st_mtime > _LEFT_BEHIND:
                    os.unlink(file)


def _folder(given: Any) -> Path:
    """InputError where it is no path of a folder."""
    path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise InputError(
            f"the folder for activations is {given!r}, expected a path, such as 'activations', or '.' for the working "
            "directory"
        )
    return Path(path)


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and contents. It finds accidents, in less than half the time of a secure hash."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(header_of(name, tensors[name]), value))
    return f"{value:08x}"


def _listed(folder: str | Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """Nothing where it was removed meanwhile, or may not be read."""
    with suppress(OSError), os.scandir(folder) as found:
        return list(found)
    return []


def _size_of(file: os.DirEntry[str]) -> int:
    with suppress(OSError):  # removed meanwhile
        return file.stat(follow_symlinks=False).st_size
    return 0
