"""One run as a pure state machine, over `fedgrpc.rounds`: no I/O, no clock, no chance, nothing awaited."""
