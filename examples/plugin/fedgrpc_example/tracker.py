"""A tracker (`--track csv:figures.csv`): one line for each figure of a round."""

import csv
from pathlib import Path


class Csv:
    def __init__(self, target):
        self._file = Path(target).open("a", newline="", buffering=1)  # noqa: SIM115
        self._writer = csv.writer(self._file)
        self._run = ""

    def begin(self, run, settings):
        self._run = run

    def log(self, step, values, at_s):
        self._writer.writerows((self._run, step, name, value) for name, value in sorted(values.items()))

    def end(self):
        self._file.close()
