"""Benchmarks: run each from the repository's root, ``python -m benchmarks.compare --help`` first."""
