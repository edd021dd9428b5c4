"""The prediction engine: predictors, execution plans, adaptive numbers of draws and moment propagation."""

from vbdl import former

__getattr__ = former.names(__name__, {"Predictor": "predictor.Predictor"})
