"""Calls a module with other weights than its own: inputs of any structure, many states at once."""
