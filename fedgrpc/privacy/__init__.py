"""Differential privacy with a ledger, and sums of updates that nobody sees."""
