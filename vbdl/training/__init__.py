"""Trains: one stacked step of all members, checkpoints, early stopping."""
