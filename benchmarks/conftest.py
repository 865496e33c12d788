"""What a file of measurements says besides, of what was measured."""

from importlib.metadata import version
from typing import Any

PACKAGES = ("gtflops", "torch", "transformers", "numpy", "scipy")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["versions"] = {package: version(package) for package in PACKAGES}
