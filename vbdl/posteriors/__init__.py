"""The methods, one a file: each is a `Posterior` over the parameters or the masks of a network."""
