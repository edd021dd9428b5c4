"""Training of posteriors: the compiled step of all members, checkpoints and early stopping."""
