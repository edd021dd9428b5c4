"""Likelihoods: p(y | x) from a network's outputs, its loss, its average over draws, and its kinds of uncertainty."""
