"""The command `fedgrpc`. Settings are read here, once; everything below gets values."""
