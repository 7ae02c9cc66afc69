"""Rounds as a pure state machine: no I/O, no clock, no chance. Time and choices are arguments."""
