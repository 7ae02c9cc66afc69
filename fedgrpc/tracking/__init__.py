"""Trackers: where the figures of a run go, real or simulated, round by round."""
