"""Aggregation in pure numpy: which updates are admitted, how they are averaged, what becomes of the mean."""
