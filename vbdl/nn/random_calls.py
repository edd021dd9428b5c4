"""torch's random functions replaced while a network runs: each gets the noise of a draw, wherever it is called.

`torch.randn_like(mu)`, `eps.normal_()`, `Normal(mu, std).rsample()` and the like; dropout gets masks of the same draw.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from vbdl.nn.interception import CounterDropout
from vbdl.nn.noise import Noise
from vbdl.nn.random_functions import OF_INIT, REPLACEMENTS

_REFUSED = frozenset(
    """poisson binomial _standard_gamma _sample_dirichlet fractional_max_pool2d fractional_max_pool2d_with_indices
    fractional_max_pool3d fractional_max_pool3d_with_indices native_dropout _fused_dropout""".split()
)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class CounterNoise(CounterDropout):
    """A context in which torch's random functions and dropout give this noise.

    linears: a mode that `F.linear` runs in; inside of a mode of its own each function would take twice as long.
    """

    def __init__(self, noise: Noise, linears: TorchFunctionMode | None = None):
        super().__init__(noise.masks)
        self._noise, self._linears = noise, linears

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        output = self._called(func, types, args, kwargs or {})
        if self._noise.followed is not None:
            self._noise.followed.see(func, args, kwargs, output)
        return output

    def _called(self, func: Callable[..., Any], types: Sequence[type], args: Any, kwargs: Any) -> Any:
        """What the function returns under the noise."""
        args, kwargs = self._noise.as_drawn((args, kwargs))
        name = getattr(func, "__name__", "")
        if func is F.linear and self._linears is not None:
            return self._linears.__torch_function__(func, types, args, kwargs)
        if (replacement := OF_INIT.get(func) or REPLACEMENTS.get(name)) is not None:
            if kwargs.get("out") is not None:
                self._noise.refuse(f"{name}(out=)")
            if kwargs.pop("generator", None) is not None:
                instead = "leave generator= out or, for a constant, make it a buffer in __init__"
                self._noise.refuse(f"{name}(generator=)", instead)
            return replacement(self._noise, *args, **kwargs)
        if name in _REFUSED:
            self._noise.refuse(name)
        if func == _DATA or name == "detach":  # `data` as `detach`, because torch's transforms refuse it
            return self._noise.alias(args[0])
        return super().__torch_function__(func, types, args, kwargs)


# -- checks of torch.distributions


class _Checks:
    """How many forwards run without the checks of `torch.distributions`, and whether they were on before."""

    lock = threading.Lock()
    running = 0
    before = True


@contextlib.contextmanager
def without_checks_of_values() -> Iterator[None]:
    """A context in which `torch.distributions` does not check its values, which no trace or `vmap` allows."""
    with _Checks.lock:
        if _Checks.running == 0:
            _Checks.before = Distribution._validate_args
            Distribution.set_default_validate_args(False)
        _Checks.running += 1
    try:
        yield
    finally:
        with _Checks.lock:
            _Checks.running -= 1
            if _Checks.running == 0:
                Distribution.set_default_validate_args(_Checks.before)
