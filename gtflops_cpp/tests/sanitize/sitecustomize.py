"""On PYTHONPATH in `make sanitize` alone: every Python process gets the extension built there.

The suite starts other processes, and from other folders, so that no order of sys.path would do.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType

[CORE] = pathlib.Path(__file__).parents[3].glob("build/sanitize/_core.*.so")


class SanitizedCore(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, CORE) if name == "gtflops._core" else None


sys.meta_path.insert(0, SanitizedCore())
