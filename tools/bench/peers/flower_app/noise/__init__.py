"""A Flower app: every client returns the model that it was given plus noise."""
