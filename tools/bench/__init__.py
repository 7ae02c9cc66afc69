"""Benchmarks and experiments, each run from the repository's root as `python -m tools.bench.NAME`."""
