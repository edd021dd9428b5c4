"""The generalized Gauss-Newton matrix of a network and a likelihood, its eigenvalues and the Laplace evidence.

blocks.py      the parameters to approximate, grouped into blocks: diagonal, Kronecker or dense
uses.py        a forward pass that records which operations use these parameters, with their inputs
columns.py     the vectors whose backward passes add up to the Hessian in the outputs
gauss_newton.py  the pass over the batches, which adds them up
choosing.py    the parameters: the last layer, some or all, grouped into factors
evidence.py    the log evidence as a function of prior precisions, and where it is largest
"""
