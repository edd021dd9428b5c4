"""Predicts: executions of posteriors, tiles of rows, plans, adaptive draws, moments."""
