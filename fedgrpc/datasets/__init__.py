"""Data sets, how they are partitioned, and files with one device's share."""
