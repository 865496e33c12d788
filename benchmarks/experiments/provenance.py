"""What a raw result was made by: commit, versions, machine and date."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpuinfo import get_cpu_info  # type: ignore[import-untyped]

PACKAGES = ("gtflops", "torch", "transformers", "peft", "numpy")


def provenance(command: str, **seeds: int) -> dict[str, Any]:
    """Of what ``command`` measures now; ``-dirty`` behind the commit says that files were changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.strip(),
        "seeds": seeds,
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": get_cpu_info().get("brand_raw", "unknown"),
            "cores": os.cpu_count(),
        },
    }


def described(made: dict[str, Any]) -> str:
    """The same in a sentence."""
    machine = made["machine"]
    seeds = ", ".join(f"{of} {seed}" for of, seed in made["seeds"].items())
    return (
        f"`{made['command']}` on {made['date']} at commit {made['commit']}: {machine['system']}, {machine['cpu']}, "
        f"{machine['cores']} cores, Python {made['python']}, "
        + ", ".join(f"{package} {number}" for package, number in made["versions"].items())
        + (f"; seeds: {seeds}" if seeds else "")
        + "."
    )
