"""Tensors to bytes and back: pure numpy and zstd, without I/O of its own, clocks or gRPC."""
