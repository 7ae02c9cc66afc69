"""Federated algorithms, one file each, with both halves: the term it adds to training, its step on updates."""
