"""The command `fedgrpc`. Settings are read here, once; everything below gets values."""

from fedgrpc.process import end_on_sigterm_as_init

# Before the imports of the command, which take a second on a small device.
end_on_sigterm_as_init()
