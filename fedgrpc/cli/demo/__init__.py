"""`fedgrpc demo`: a whole federation on one machine, every part its own process."""
