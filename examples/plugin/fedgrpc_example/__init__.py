"""Example plugins for fedgrpc, one of each kind."""
