"""Tries the gtflops that is installed, in an environment that has nothing else: ``make release-check``."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

import gtflops


def main() -> None:
    environment = Path(sys.prefix)
    assert environment in Path(gtflops.__file__).parents, f"{gtflops.__file__} is not the one that was installed"
    assert metadata("gtflops")["License-Expression"] == "Apache-2.0"

    chain = gtflops.knapsack(dw=[4, 4, 9], dy=[1, 1, 1], importance=[1.0, 2.5, 3.0], capacity=11)  # the extension
    assert chain.optimal
    assert chain.value == 3.5

    profile = gtflops.profile("openai-community/gpt2", batch_size=1, seq_len=16)  # a preset: data of the package
    selection = gtflops.select(profile, {tensor.name: tensor.numel for tensor in profile.tensors}, budget=0.6)
    assert selection.optimal

    os.environ.pop("PYTHONPATH", None)
    os.chdir(tempfile.mkdtemp())
    profile.report("gpt2.md")
    profile.save("gpt2.json")
    command = environment / "bin" / "gtflops"
    for arguments in (["--version"], ["profile", "gpt2.json"], ["select", "gpt2.json", "--importance", "numel"]):
        subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
    print(f"gtflops {metadata('gtflops')['Version']} works in {environment}")


if __name__ == "__main__":  # doctest collection imports it
    main()
