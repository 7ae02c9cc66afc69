"""Aggregation as pure numpy: which updates are admitted, how they are averaged, what the server makes of the mean."""
