"""Networks that draw from counters: dropout, sampled weights, Bayesian layers, and the training objective."""
