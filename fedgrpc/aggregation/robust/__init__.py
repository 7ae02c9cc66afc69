"""Rules that make one update of many, of which some may be meant to do harm."""
