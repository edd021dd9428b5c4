"""Rules for operations that only rearrange elements: means and variances are rearranged alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vbdl.engine.moments.value import Moments, as_moments, each, rule

_REARRANGING = """view _unsafe_view reshape permute transpose t expand slice select squeeze unsqueeze clone contiguous
alias detach flip unfold repeat index_select constant_pad_nd reflection_pad2d replication_pad2d pixel_shuffle
upsample_nearest2d narrow lift_fresh_copy""".split()


def _rearrange(name: str):
    operation = getattr(torch.ops.aten, name)

    def run(x: Moments, *args, **kwargs):
        if name == "constant_pad_nd":  # the padding has variance 0
            sizes, *value = args
            return Moments(operation(x.mean, sizes, *value), operation(x.var, sizes, 0.0))
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


@rule("cat")
def concatenate(parts: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    moments = [as_moments(p) for p in parts]
    return Moments(torch.cat([m.mean for m in moments], dim), torch.cat([m.var for m in moments], dim))


@rule("stack")
def stack(parts: Sequence[Moments | Tensor], dim: int = 0) -> Moments:
    moments = [as_moments(p) for p in parts]
    return Moments(torch.stack([m.mean for m in moments], dim), torch.stack([m.var for m in moments], dim))


@rule("split", "split_with_sizes", "chunk")
def split(x: Moments, size: int | Sequence[int], dim: int = 0) -> list[Moments]:
    return [Moments(m, v) for m, v in zip(x.mean.split(size, dim), x.var.split(size, dim), strict=True)]  # type: ignore[arg-type]


@rule("unbind")
def unbind(x: Moments, dim: int = 0) -> list[Moments]:
    return [Moments(m, v) for m, v in zip(x.mean.unbind(dim), x.var.unbind(dim), strict=True)]
