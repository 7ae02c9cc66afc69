"""A selector (`--selection round-robin`): whoever was selected longest ago."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundRobin:
    """Workers in turn; `newest_first` takes those that were never selected before all others."""

    newest_first: int = 1

    def choose(self, idle, count, histories, round_number, rng):
        def waited(worker):
            history = histories.get(worker)
            selected_in = history.selected_in if history is not None else 0
            return (selected_in or not self.newest_first, selected_in, worker)

        return sorted(idle, key=waited)[:count]
