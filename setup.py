"""Builds the C++ extension through CMake; everything else is in pyproject.toml."""

from setuptools import setup

setup(cmake_source_dir=".")
