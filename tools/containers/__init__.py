"""Real containers on one Linux machine: their networks, their limits, what is measured. Needs root and podman."""
