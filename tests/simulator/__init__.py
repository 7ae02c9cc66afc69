"""The fault simulator: the production run in worlds full of crashes, partitions and lost messages. Seeded."""
