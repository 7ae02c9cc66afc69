"""The same round of noise in other frameworks, each run by a Python of its own that has it installed."""
