"""The production round under a virtual clock: simulated workers, networks and faults. Pure, seeded."""
