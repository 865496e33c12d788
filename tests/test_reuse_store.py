"""Activations on the disk: whatever happens to the files, what is read is what was written."""

import errno
import itertools
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from gtflops import InputError
from gtflops.reuse import ActivationStore, Key

KEY = Key("a" * 64, "b" * 64)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path)


def path_of(store: ActivationStore) -> Path:
    (path,) = store.folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 4)])
def test_what_is_read_is_what_was_written(store: ActivationStore, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"layers.1": torch.randn(shape).to(dtype), "other": torch.ones(2)}
    assert KEY not in store
    assert store.read(KEY) is None
    store.write(KEY, tensors)
    assert KEY in store
    found = store.read(KEY)
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert store.bytes_read == store.bytes_written == path_of(store).stat().st_size
    assert not store.rejected


def test_a_view_of_a_tensor_is_written_as_it_looks(store: ActivationStore) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    store.write(KEY, {"x": whole.T[1:]})
    found = store.read(KEY)
    assert found is not None
    assert torch.equal(found["x"], whole.T[1:])


def test_every_flipped_bit_is_found(store: ActivationStore) -> None:
    tensors = {"x": torch.arange(8.0)}
    store.write(KEY, tensors)
    content = path_of(store).read_bytes()
    path = path_of(store)
    for position in range(len(content)):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = store.read(KEY)
            assert found is None or torch.equal(found["x"], tensors["x"]), position
    assert set(store.rejected) <= {"unreadable", "changed since it was written", "of another prefix or example"}
    assert store.rejected.total() >= 3 * tensors["x"].numel() * 4


def test_a_file_cut_at_any_byte_is_found(store: ActivationStore) -> None:
    store.write(KEY, {"x": torch.arange(8.0)})
    content = path_of(store).read_bytes()
    path = path_of(store)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert store.read(KEY) is None
        assert not path.exists()
    path.write_bytes(content + b"\0")
    assert store.read(KEY) is None
    assert store.rejected == {"unreadable": len(content) + 1}


def test_an_entry_in_the_place_of_another(store: ActivationStore) -> None:
    store.write(KEY, {"x": torch.ones(2)})
    content = path_of(store).read_bytes()
    for other in (Key("c" * 64, KEY.example), Key(KEY.prefix, "b" * 63 + "c")):
        path = store._path(other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert store.read(other) is None
    assert store.rejected == {"of another prefix or example": 2}
    assert store.read(KEY) is not None


def test_what_was_read_stays_when_the_entry_is_written_anew(store: ActivationStore) -> None:
    """Another process may: the file that is mapped is not the one that takes its place."""
    store.write(KEY, {"x": torch.ones(1 << 16)})
    found = store.read(KEY)
    store.write(KEY, {"x": torch.zeros(1 << 16)})
    path_of(store).unlink()
    assert found is not None
    assert bool((found["x"] == 1).all())


def write_without_end(folder: Path, num_entries: int) -> None:
    """Entries of 1 MB, each full of the number in its key."""
    store = ActivationStore(folder)
    for number in itertools.cycle(range(num_entries)):
        store.write(Key("prefix", f"{number:064d}"), {"x": torch.full((1 << 18,), float(number))})


@contextmanager
def writing(folder: Path, num_entries: int) -> Iterator[BaseProcess]:
    """Another process that writes, from its first entry on; killed by signal 9 at the end."""
    process = multiprocessing.get_context("fork").Process(target=write_without_end, args=(folder, num_entries))
    process.start()
    try:
        while not any(folder.rglob("*.safetensors")):
            assert process.is_alive()
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.join()


def test_killed_while_writing(tmp_path: Path) -> None:
    """At any moment: every entry that is there is whole, and what is not is no entry."""
    num_found, num_left = 0, 0
    for turn in range(20):
        folder = tmp_path / str(turn)
        with writing(folder, 50) as process:
            time.sleep(0.001 * turn)
        assert process.exitcode == -signal.SIGKILL
        store = ActivationStore(folder)
        for path in folder.rglob("*.safetensors"):
            entry = store.read(Key("prefix", path.stem))
            assert entry is not None
            assert bool((entry["x"] == int(path.stem)).all())
            num_found += 1
        num_left += len(list((folder / ".unfinished").iterdir()))
        assert not store.rejected
    assert num_found >= 20
    assert num_left > 0, "none was killed while it wrote"


def test_two_processes_write_the_same_entries(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    num_read = 0
    with writing(tmp_path, 4) as first, writing(tmp_path, 4) as second:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for number in range(4):
                entry = store.read(Key("prefix", f"{number:064d}"))
                if entry is not None:
                    assert bool((entry["x"] == number).all())
                    num_read += 1
        assert first.is_alive()
        assert second.is_alive()
    assert num_read > 4
    assert not store.rejected


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_full_disk_is_one_warning(store: ActivationStore, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(KEY, {"x": torch.ones(2)})

    def full(path: Any, *_: Any) -> None:
        if fails == "write_bytes":  # as much as there was room for
            with open(path, "wb") as file:
                file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Path, "write_bytes") if fails == "write_bytes" else (os, "replace")), full)
    other = Key(KEY.prefix, "d" * 64)
    with pytest.warns(UserWarning, match=r"takes no more activations: No space left on device .*computed each time"):
        store.write(other, {"x": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.write(other, {"x": torch.ones(2)})
    assert store.read(other) is None
    assert store.read(KEY) is not None
    assert store.full is not None
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == [f"{KEY.example}.safetensors"]


def test_max_bytes(tmp_path: Path) -> None:
    size = 1000
    earlier = ActivationStore(tmp_path)
    for number in range(3):
        earlier.write(Key("of another run", f"{number:064d}"), {"x": torch.zeros(size, dtype=torch.uint8)})
    each = earlier.bytes_written // 3
    store = ActivationStore(tmp_path, max_bytes=5 * each + each // 2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(6):
            store.write(Key("of another run", f"{number + 3:064d}"), {"x": torch.zeros(size, dtype=torch.uint8)})
    assert len(warned) == 1
    assert f"it holds {5 * each} bytes of max_bytes={5 * each + each // 2}" in str(warned[0].message)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 5 * each + each // 2


def test_room_is_made_for_another_prefix(tmp_path: Path) -> None:
    entry = {"x": torch.zeros(1000, dtype=torch.uint8)}
    store = ActivationStore(tmp_path, max_bytes=3000)
    store.write(Key("old", KEY.example), entry)
    store.write(Key("new", KEY.example), entry)
    with pytest.warns(UserWarning, match="takes no more"):
        store.write(Key("new", "c" * 64), entry)
    store.remove_all_but({"new"})
    assert Key("old", KEY.example) not in store
    assert Key("new", KEY.example) in store
    store.write(Key("new", "c" * 64), entry)
    assert Key("new", "c" * 64) in store


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, True])
def test_limits_that_are_none(tmp_path: Path, max_bytes: Any) -> None:
    with pytest.raises(InputError, match="expected a positive number of bytes"):
        ActivationStore(tmp_path, max_bytes=max_bytes)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep activations in .*file.*expected a folder"):
        ActivationStore(tmp_path / "file" / "store")


def test_what_a_killed_process_left_is_removed_after_an_hour(store: ActivationStore) -> None:
    old, new = (store.folder / ".unfinished" / name for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    ActivationStore(store.folder)
    assert not old.exists()
    assert new.exists()
