"""Generators of the reference pages: each module writes one page of `docs/reference` from the code."""
