"""What importing costs: the solver and saved profiles need no torch."""

import subprocess
import sys

import pytest

import gtflops
import gtflops.training


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import gtflops",
        "from gtflops.solver import knapsack",
        "from gtflops import Profile, select, knapsack, InputError",
        "import gtflops.report",
        "import gtflops.report.log",
        "from gtflops.training import Energy, JsonLines, Total, TrainingLog, read_log",
        "import gtflops.cli",
    ],
)
def test_no_heavy_import(statement: str) -> None:
    heavy = {"torch", "transformers", "networkx", "fvcore", "plotly", "pandas", "scipy"}
    assert not heavy & modules_after(statement)


def test_importing_the_package_loads_nothing_of_it() -> None:
    loaded = {name for name in modules_after("import gtflops") if name.startswith("gtflops")}
    assert loaded == {"gtflops", "gtflops.lazy_names"}


def test_every_public_name_is_there() -> None:
    for name in gtflops.__all__:
        assert getattr(gtflops, name) is not None
    assert set(gtflops.__all__) == set(gtflops._HOME)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = gtflops.unknown


def test_every_name_of_training_is_there() -> None:
    for name in gtflops.training.__all__:
        assert getattr(gtflops.training, name).__name__ == name
    assert set(gtflops.training.__all__) == set(gtflops.training._HOME)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = gtflops.training.unknown


def test_importing_the_package_takes_less_than_200_ms() -> None:
    """In the best of five processes; it loads nothing yet, so that some 5 ms are due."""
    code = "import time; start = time.perf_counter(); import gtflops; print(time.perf_counter() - start)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) for _ in range(5)
    ]
    assert min(seconds) < 0.2
