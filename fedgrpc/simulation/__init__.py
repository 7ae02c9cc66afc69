"""The production round under a virtual clock, with a described fleet (`fedgrpc simulate`). Pure, seeded."""
