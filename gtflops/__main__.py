"""``python -m gtflops``."""

from gtflops.cli import main

main()
