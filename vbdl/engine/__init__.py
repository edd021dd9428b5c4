"""Predicts: executions of posteriors, tiles of rows, plans, adaptive draws, moments."""

from vbdl import former

__getattr__ = former.names(__name__, {"Predictor": "predictor.Predictor"})
