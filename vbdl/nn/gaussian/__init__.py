"""Gaussian posteriors q(w) = N(mean, C) over the parameters of a network; each file writes the covariance C in one way.

factor          of parameters w                       C
Diagonal        any                                   1 / (curvature + prior precision)
RowHessian      any                                   1 / (n_data (hessian + weight decay)), trained
LowRank         any                                   std^2 / 2 + sum_k D_k D_k^T / (2 (rank - 1))
Kronecker       weight (and bias) of a layer          (output curvature x input curvature + prior precision)^-1
Dense           any, few                              (curvature + prior precision)^-1
"""

from vbdl.nn.gaussian.dense import Dense as Dense
from vbdl.nn.gaussian.diagonal import Diagonal as Diagonal
from vbdl.nn.gaussian.diagonal import Independent as Independent
from vbdl.nn.gaussian.factor import Factor as Factor
from vbdl.nn.gaussian.kronecker import Kronecker as Kronecker
from vbdl.nn.gaussian.low_rank import LowRank as LowRank
from vbdl.nn.gaussian.network import CannotLinearize as CannotLinearize
from vbdl.nn.gaussian.network import GaussianNetwork as GaussianNetwork
from vbdl.nn.gaussian.row_hessian import RowHessian as RowHessian
