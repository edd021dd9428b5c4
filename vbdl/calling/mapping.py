"""Whether calls of one module with many states may be mapped together: both ways must compute the same."""

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from vbdl.calling.attributes import Attributes, OfMembers
from vbdl.calling.each import call_each
from vbdl.calling.graphs import in_words
from vbdl.calling.stacking import call_stacked
from vbdl.types import Inputs, State


def can_map(module: nn.Module) -> bool:
    """False if the module has one of torch's layers that vmap has no rule for: recurrent layers and spectral norm."""
    layers = (nn.RNNBase, _SpectralNorm, SpectralNorm)
    return not any(isinstance(m, layers) for sub in module.modules() for m in (sub, *sub._forward_pre_hooks.values()))


def why_not_mapped(
    module: nn.Module,
    stacked: State,
    shared: State,
    inputs: Inputs,
    inputs_stacked: bool = False,
    watch: contextlib.AbstractContextManager[object] | None = None,
) -> str | None:
    """The reason why `call_stacked` must not replace `call_each`, or None if both agree in values and gradients.

    Both run on these inputs: vmap has no rule for some operations, and incomplete rules for others. The arguments, the
    module's attributes and torch's generator stay unchanged. For a module that draws random numbers the two are not
    compared: returns None.

    watch: a context in which the module is called mapped together.
    """
    if not can_map(module):
        return "recurrent layers and power iterations have no batching rule"
    training, attributes = torch.is_grad_enabled(), Attributes(module)

    def run(execute: Callable[..., Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        copies = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in stacked.items()}
        shared_copies = {n: t.detach().clone().requires_grad_(t.requires_grad and training) for n, t in shared.items()}
        extra = {"randomness": "different"} if execute is call_stacked else {}
        trained = [t for t in (*copies.values(), *shared_copies.values()) if t.requires_grad]
        with torch.set_grad_enabled(bool(trained)), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*batching rule.*")  # otherwise torch warns, and loops inside vmap
            # a new dict, because the tensors to differentiate must not be replaced in `copies`
            seen = watch if watch is not None and execute is call_stacked else contextlib.nullcontext()
            with attributes.kept(), seen:
                outputs = execute(
                    module, dict(copies), dict(shared_copies), inputs, inputs_stacked=inputs_stacked, **extra
                )
            gradients = ()
            if outputs.requires_grad:
                gradients = torch.autograd.grad(outputs.sum(), trained, allow_unused=True, materialize_grads=True)
        written = [t.detach() for t in copies.values() if not t.requires_grad and t.is_floating_point()]
        return (outputs.detach(), *written), gradients

    device = next(iter(stacked.values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before = torch.get_rng_state()
        try:
            together = run(call_stacked)
        except Exception as error:  # vmap raises errors of many types
            return in_words(error)
        if not torch.equal(before, torch.get_rng_state()):
            return None
        of_members = OfMembers(module, next(iter(stacked.values())).shape[0])
        values, gradients = run(functools.partial(call_each, turn=of_members.turn))
        # a gradient that is zero but for rounding, like that of a bias before batch normalization, is exact enough
        rounding = _ROUNDING * max(map(_largest, gradients), default=0.0)
        least = [0.0] * len(values) + [rounding] * len(gradients)
        for a, b, zero in zip((*together[0], *together[1]), (*values, *gradients), least, strict=True):
            if not torch.allclose(a, b, rtol=_APART, atol=max(_APART * _largest(b), zero), equal_nan=True):
                return "mapped together they compute other numbers than one after the other"
    return None


def _largest(t: Tensor) -> float:
    """The largest magnitude of finite numbers, 0 if there are none."""
    return float(t.abs().nan_to_num(posinf=0.0).max()) if t.numel() else 0.0


_APART = 1e-3  # relative to the largest number: far above rounding errors, far below the effect of a wrong rule


_ROUNDING = 1e-5  # relative to the largest gradient: what cancellation leaves of a gradient that is zero
