"""Generated messages to values and back: a module for each family. Nothing from the wire is trusted."""
