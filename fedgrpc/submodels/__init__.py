"""Sub-models: the coordinates of a model that a device gets, and their cost for it."""
