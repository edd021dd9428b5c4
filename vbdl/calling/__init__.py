"""Calls of modules with replaced weights: nested inputs, and many sets of weights in one call."""
