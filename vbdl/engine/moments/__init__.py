"""Moment propagation: one deterministic pass with a mean and a variance in place of every random number.

AN APPROXIMATION. Every value is taken to be normal and independent of the others, so that a layer needs two numbers
each: linear layers propagate them exactly for independent inputs, activations have closed forms for normal ones.
Exact for a linear network with dropout or random weights in one layer; correlations between units, as after a random
layer followed by others, between branches that meet again, and between the pixels that share a dropped channel are
left out. `Predictor(..., estimator="moments").explain(x)` measures what that costs against sampling.

Hernandez-Lobato and Adams, Probabilistic Backpropagation for Scalable Learning of Bayesian Neural Networks, ICML 2015,
https://arxiv.org/abs/1502.05336
Gast and Roth, Lightweight Probabilistic Deep Networks, CVPR 2018, https://arxiv.org/abs/1805.11327
Wu, Nowozin, Meeds, Turner, Hernandez-Lobato and Gaunt, Deterministic Variational Inference for Robust Bayesian Neural
Networks, ICLR 2019, https://arxiv.org/abs/1810.03958

One rule an operation, one file a family; a network whose graph has an operation without a rule is refused by name.
"""

from vbdl.engine.moments.execution import MomentExecution as MomentExecution
