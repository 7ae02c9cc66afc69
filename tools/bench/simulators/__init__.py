"""The same simulated training in fedgrpc and in other simulators, each run by a Python that has it installed."""
