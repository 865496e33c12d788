"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from gtflops.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one beside it, so that it is never seen half written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                temporary.unlink()
                raise
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; expected a file in a writable folder") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
