"""The public API for programs, on top of everything else. `fedgrpc` itself exports it, lazily."""
