"""Rules for operations that only rearrange elements: means and variances are rearranged alike."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vbdl.engine.moments.value import Correlated, KroneckerWeights, Moments, as_moments, each, rule

_REARRANGING = """view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze clone contiguous
alias detach flip unfold repeat index_select constant_pad_nd reflection_pad2d replication_pad2d pixel_shuffle
upsample_nearest2d narrow lift_fresh_copy""".split()


def _rearrange(name: str):
    operation = getattr(torch.ops.aten, name)

    def run(x: Moments, *args, **kwargs):
        if name == "constant_pad_nd":  # the padding has variance 0
            sizes, *value = args
            return Moments(operation(x.mean, sizes, *value), operation(x.var, sizes, 0.0))
        if isinstance(x, KroneckerWeights):
            if name in ("clone", "contiguous", "alias", "detach"):
                return x
            if name in ("view", "_unsafe_view", "reshape", "expand") and list(args[0]) == list(x.shape):
                return x
            if name in ("slice", "select") and x.ndim == 2 and args and args[0] in (1, -1):
                return x.columns(lambda t: operation(t, -1, *args[1:], **kwargs))
        return each(lambda t: operation(t, *args, **kwargs), x)

    return run


for _name in _REARRANGING:
    if hasattr(torch.ops.aten, _name):
        rule(_name)(_rearrange(_name))


@rule("_to_copy", "to")
def convert(x: Moments, **kwargs) -> Moments:
    """Convert the dtype, for instance of a mask to numbers; a dtype that is not floating raises ValueError."""
    dtype = kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"moment propagation has no rule to convert a random value to {dtype}: use estimator='sampling'"
        )
    return Moments(x.mean.to(dtype), x.var.to(dtype))


def _joined(join: Callable[..., Tensor], parts: Sequence[Moments | Tensor], dim: int) -> Moments:
    """The moments of tensors that an operation (cat, stack) joins; normals that all random ones share stay shared."""
    moments = [as_moments(p) for p in parts]
    mean, var = join([m.mean for m in moments], dim), join([m.var for m in moments], dim)
    shared = [p for p in parts if isinstance(p, Correlated)]
    if not shared or any(p.source != shared[0].source for p in shared):
        return Moments(mean, var)
    size = shared[0].root.shape[-1]
    roots = [
        p.root if isinstance(p, Correlated) else m.mean.new_zeros(*m.shape, size)
        for p, m in zip(parts, moments, strict=True)
    ]
    axis = dim if dim >= 0 else dim - 1  # the roots have one axis more, at the end
    return Correlated(mean, var, join(roots, axis), shared[0].source)


@rule("cat")
def concatenate(parts: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    return _joined(torch.cat, parts, dim)


@rule("stack")
def stack(parts: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    return _joined(torch.stack, parts, dim)


@rule("split", "split_with_sizes", "chunk")
def split(x: Moments, size: int | Sequence[int], dim: int = 0) -> list[Moments]:
    parts = [Moments(m, v) for m, v in zip(x.mean.split(size, dim), x.var.split(size, dim), strict=True)]  # type: ignore[arg-type]
    if not isinstance(x, Correlated):
        return parts
    roots = x.root.split(size, dim if dim >= 0 else dim - 1)  # type: ignore[arg-type]
    return [Correlated(part.mean, part.var, root, x.source) for part, root in zip(parts, roots, strict=True)]


@rule("unbind")
def unbind(x: Moments, dim: int = 0) -> list[Moments]:
    return [Moments(m, v) for m, v in zip(x.mean.unbind(dim), x.var.unbind(dim), strict=True)]
