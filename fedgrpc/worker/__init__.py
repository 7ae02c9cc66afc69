"""The worker: a process on a device that polls, trains, uploads and shows what it does."""
