"""Counter-based random numbers, and operators that draw them in their kernels. Imports torch and triton, not vbdl."""

import warnings
from typing import Any

from vbdl_kernels.local_reparameterized_linear import local_reparameterized_linear as local_reparameterized_linear
from vbdl_kernels.masked_linear import masked_linear as masked_linear
from vbdl_kernels.mlp import bayesian_mlp as bayesian_mlp
from vbdl_kernels.mlp import ensemble_mlp as ensemble_mlp
from vbdl_kernels.philox import CONTRACT as CONTRACT
from vbdl_kernels.philox import keep_mask as keep_mask
from vbdl_kernels.philox import make_key as make_key
from vbdl_kernels.philox import normal as normal
from vbdl_kernels.philox import philox4x32 as philox4x32
from vbdl_kernels.philox import words as words
from vbdl_kernels.predictive_statistics import predictive_statistics as predictive_statistics
from vbdl_kernels.sample_weights import sample_weights as sample_weights
from vbdl_kernels.sampled_linear import sampled_linear as sampled_linear


def __getattr__(name: str) -> Any:
    if name != "local_reparameterised_linear":  # its name in version 0.1
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is called local_reparameterized_linear now", DeprecationWarning, stacklevel=2)
    return local_reparameterized_linear
