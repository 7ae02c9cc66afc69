"""`python -m tools.bench.transport`."""

from tools.bench.transport.measure import isolate, main

if __name__ == "__main__":
    isolate()
    main()
