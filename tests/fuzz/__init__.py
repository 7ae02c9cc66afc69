"""Damaged and invented input for everything that reads what it did not write itself; see `tests.fuzz.run`."""
