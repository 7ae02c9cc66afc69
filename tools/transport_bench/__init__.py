"""The parts of tools/bench_transport.py: contestants that move the same models, and what measures them."""
