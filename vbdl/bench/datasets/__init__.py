"""The data sets of the suite, each a function registered by name."""
