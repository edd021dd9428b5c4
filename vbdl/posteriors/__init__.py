"""The methods, one per file: each is a `Posterior` over the parameters or the dropout masks of a network."""
