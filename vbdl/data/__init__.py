"""Rows of data: reading them from tensors, datasets and loaders, splitting, tiling and fingerprinting them."""
