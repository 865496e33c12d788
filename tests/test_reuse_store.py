"""Activations on the disk: whatever happens to the files, what is read is what was written."""

import errno
import itertools
import multiprocessing
import os
import signal
import tempfile
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
OLD, NEW = "1" * 64, "2" * 64


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
        store.write(Key(KEY.prefix, f"{number:064d}"), {"x": torch.full((1 << 18,), float(number))})


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
            entry = store.read(Key(KEY.prefix, path.stem))
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
                entry = store.read(Key(KEY.prefix, f"{number:064d}"))
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
        earlier.write(Key(OLD, f"{number:064d}"), {"x": torch.zeros(size, dtype=torch.uint8)})
    each = earlier.bytes_written // 3
    store = ActivationStore(tmp_path, max_bytes=5 * each + each // 2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(6):
            store.write(Key(OLD, f"{number + 3:064d}"), {"x": torch.zeros(size, dtype=torch.uint8)})
    assert len(warned) == 1
    assert f"it holds {5 * each} bytes of max_bytes={5 * each + each // 2}" in str(warned[0].message)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 5 * each + each // 2


def test_room_is_made_for_another_prefix(tmp_path: Path) -> None:
    entry = {"x": torch.zeros(1000, dtype=torch.uint8)}
    store = ActivationStore(tmp_path, max_bytes=3000)
    store.write(Key(OLD, KEY.example), entry)
    store.write(Key(NEW, KEY.example), entry)
    with pytest.warns(UserWarning, match="takes no more"):
        store.write(Key(NEW, "c" * 64), entry)
    store.remove_all_but({NEW})
    assert Key(OLD, KEY.example) not in store
    assert Key(NEW, KEY.example) in store
    store.write(Key(NEW, "c" * 64), entry)
    assert Key(NEW, "c" * 64) in store


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, True])
def test_limits_that_are_none(tmp_path: Path, max_bytes: Any) -> None:
    with pytest.raises(InputError, match="expected a positive number of bytes"):
        ActivationStore(tmp_path, max_bytes=max_bytes)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep activations in .*file.*expected a folder"):
        ActivationStore(tmp_path / "file" / "store")


def test_what_a_killed_process_left_is_removed_after_an_hour(store: ActivationStore) -> None:
    old, new, foreign = (store.folder / ".unfinished" / name for name in ("0" * 32, "1" * 32, "notes.txt"))
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (time.time() - 4000,) * 2)
    ActivationStore(store.folder)
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()


@pytest.mark.parametrize("max_bytes", [None, 3000])
def test_what_the_store_did_not_make_is_neither_removed_nor_counted(tmp_path: Path, max_bytes: int | None) -> None:
    """It may be given a folder with other things in it: checkpoints, or folders with names of its own form."""
    outside = tmp_path / "outside" / "12"
    folder = tmp_path / "store"
    foreign = [
        outside / f"{KEY.example}.safetensors",
        folder / "checkpoint-500" / "model.safetensors",
        folder / "notes.txt",
        folder / ("3" * 64) / "notes.txt",
        folder / ("4" * 64),  # a file
        folder / OLD / "bb" / "model.safetensors",
        folder / OLD / "bbb" / f"{KEY.example}.safetensors",
        folder / OLD / "12" / f"{KEY.example}.safetensors" / "a folder.txt",
        folder / ("A" * 64) / "bb" / f"{KEY.example}.safetensors",
        folder / ".unfinished" / "thesis.tex",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"years of work" * 1000)
    (folder / OLD / "12" / f"{KEY.prefix}.safetensors").symlink_to(foreign[0])
    (folder / ("5" * 64)).symlink_to(outside.parent)
    before = set(tmp_path.rglob("*"))
    store = ActivationStore(folder, max_bytes=max_bytes)
    entry = {"x": torch.zeros(1000, dtype=torch.uint8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prefix, example in ((OLD, "b"), (OLD, "c"), (NEW, "b"), (NEW, "c")):
            store.write(Key(prefix, example * 64), entry, instead_of_others={prefix})
    store.remove_all_but({NEW})
    assert Key(OLD, "c" * 64) not in store
    assert Key(NEW, "c" * 64) in store
    store.remove_all_but(())
    assert set(tmp_path.rglob("*")) == before
    assert all(path.read_bytes() == b"years of work" * 1000 for path in foreign)


@pytest.mark.parametrize("folder", ["", 5, b"x", ["a"], None, "a\0b"])
def test_a_folder_that_is_none(folder: Any) -> None:
    with pytest.raises(InputError, match=r"expected a (path, such as 'activations'|folder)"):
        ActivationStore(folder)


@pytest.mark.parametrize("key", [Key("..", KEY.example), Key(KEY.prefix, "../../x"), Key("A" * 64, KEY.example)])
def test_a_key_that_is_none(key: Key, store: ActivationStore) -> None:
    for use in (store.__contains__, store.read, lambda key: store.write(key, {"x": torch.ones(2)})):
        with pytest.raises(InputError, match="expected two digests"):
            use(key)


@contextmanager
def another_user() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_another_user_may_not_read_is_lacking() -> None:
    """And what cannot be written beside it is one warning."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        store = ActivationStore(folder)
        store.write(KEY, {"x": torch.ones(2)})
        own = store.folder / KEY.prefix
        own.chmod(0)
        try:
            with warnings.catch_warnings(record=True) as warned, another_user():
                warnings.simplefilter("always")
                theirs = ActivationStore(folder, max_bytes=10**6)
                assert KEY not in theirs
                theirs.write(KEY, {"x": torch.ones(2)}, instead_of_others={KEY.prefix})
                assert theirs.read(KEY) is None
                theirs.remove_all_but(())
            assert len(warned) == 1
            assert "takes no more activations: Permission denied" in str(warned[0].message)
        finally:
            own.chmod(0o700)
        assert KEY in store
