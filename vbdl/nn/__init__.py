"""Layers and interceptions that take a draw; `inspect`, which finds what is stochastic in a module."""
