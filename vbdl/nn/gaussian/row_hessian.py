"""Factors of independent parameters whose precisions are trained: those of natural-gradient methods."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vbdl.nn.drawn import once
from vbdl.nn.gaussian.diagonal import Independent


class RowHessian(Independent):
    """Independent normals with variances 1 / (n_data (hessian + weight_decay)), one Hessian for every weight.

    The Hessian is that of the mean loss of a row, and weight_decay the prior precision for each row. They are trained:
    the gradient of a loss in them is that in the std by the chain rule.

    Parameters: `hessian_0`, `hessian_1`, ..., in the shapes of `names`, in float32 at least, since running means of
    small steps would be lost in less.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n_data: int,
        weight_decay: float,
        initial: float,
        padding: Mapping[str, int] | None = None,
    ):
        super().__init__(parameters, padding)
        self.n_data, self.weight_decay = n_data, weight_decay
        self._narrow = {name: p.dtype for name, p in parameters.items() if p.dtype.itemsize < 4}
        for index, p in enumerate(parameters.values()):
            values = torch.full_like(p, initial, dtype=torch.promote_types(p.dtype, torch.float32))
            self.register_parameter(f"hessian_{index}", nn.Parameter(values))

    def hessian(self, name: str) -> Tensor:
        """The Hessian of every weight of a parameter, in its shape."""
        return getattr(self, f"hessian_{self.names.index(name)}")

    def std(self, name: str) -> Tensor:
        """The std of every weight of a parameter, in its shape; computed once for the draws of a training step."""
        hessian = self.hessian(name)

        def std() -> Tensor:
            precision = self.n_data * (hessian + self.weight_decay)
            return self.masked(name, precision.rsqrt().to(self._narrow.get(name, precision.dtype)))

        return once("std", hessian, std)
