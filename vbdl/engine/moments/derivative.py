"""Rules for the derivatives of activations, which multiply the tangent of a linearized network by f'(x).

The point x is the network at its mean, which is not random, so the product is linear in the tangent and exact.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vbdl.engine.moments.arithmetic import mul
from vbdl.engine.moments.value import Moments, Value, is_random, mean_of, rule

_DERIVATIVES = """threshold_backward tanh_backward sigmoid_backward gelu_backward silu_backward elu_backward
leaky_relu_backward hardtanh_backward softplus_backward hardswish_backward hardsigmoid_backward mish_backward""".split()


def _product(name: str) -> Callable[..., Moments]:
    operation = getattr(torch.ops.aten, name)

    def run(tangent: Value, *arguments: object, **keywords: object) -> Moments:
        if is_random([*arguments, *keywords.values()]):
            raise ValueError(
                f"moment propagation has no rule for aten.{name} at a random point: use estimator='sampling'"
            )
        slope: Tensor = operation(torch.ones_like(mean_of(tangent)), *arguments, **keywords)
        return mul(tangent, slope)

    return run


for _name in _DERIVATIVES:
    if hasattr(torch.ops.aten, _name):
        rule(_name)(_product(_name))
