"""Reads rows: tensors, datasets, loaders; splits them, and tells one row from another."""
