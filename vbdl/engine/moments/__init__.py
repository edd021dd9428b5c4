"""Moment propagation: one deterministic pass that replaces each random value by its mean and its variance.

AN APPROXIMATION. Every value is assumed to be normal and independent of the others, so a mean and a variance for each
unit are enough: linear layers propagate them exactly for independent inputs, activations have closed forms for normal
inputs. The result is exact for a linear network with dropout or random weights in one layer. Ignored are correlations
between units (as in layers after a random one), between branches that are added or concatenated, and between pixels
that share a dropped channel. `Predictor(..., estimator="moments").explain(x)` measures the error against sampling.

Hernandez-Lobato and Adams, Probabilistic Backpropagation for Scalable Learning of Bayesian Neural Networks, ICML 2015,
https://arxiv.org/abs/1502.05336
Gast and Roth, Lightweight Probabilistic Deep Networks, CVPR 2018, https://arxiv.org/abs/1805.11327
Wu, Nowozin, Meeds, Turner, Hernandez-Lobato and Gaunt, Deterministic Variational Inference for Robust Bayesian Neural
Networks, ICLR 2019, https://arxiv.org/abs/1810.03958

Each operation has a rule, each family of operations a file. A network with an operation that has no rule is refused,
with the operation's name.
"""

from vbdl.engine.moments.execution import MomentExecution as MomentExecution
