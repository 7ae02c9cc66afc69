"""Which coordinates of a model a device gets, and what that costs it."""
