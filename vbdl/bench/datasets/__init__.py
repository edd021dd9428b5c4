"""Data sets: one function each, registered by name."""
