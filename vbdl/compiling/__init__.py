"""Traces, rewrites and compiles calls of modules: graphs, patterns, compiled code."""
