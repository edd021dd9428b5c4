"""Dropout of elements, of channels and alpha dropout, with the masks of a draw in place of torch's generator.

Each function takes the masks and torch's own function before that function's arguments.
"""

from collections.abc import Callable

from torch import Tensor

from vbdl.nn.masks import Masks, described

_ALPHA = -1.7580993408473766  # -scale * alpha of SELU, the value of dropped units in alpha dropout


def dropout(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> Tensor:
    """`F.dropout`: drops elements."""
    if not (training if train is None else train):
        return input
    return _written(masks, func, input, masks.drop(input, p, "dropout"), inplace)


def channel_dropout(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,  # (batch, channels, ...)
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> Tensor:
    """`F.dropout1d`, `F.dropout2d` or `F.dropout3d`: drops whole channels."""
    if not (training if train is None else train):
        return input
    keep = _keep_channels(masks, func.__name__, input, p)
    return input if keep is None else _written(masks, func, input, masks.scale(input, keep), inplace)


def alpha_dropout(
    masks: Masks,
    func: Callable[..., Tensor],
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    train: bool | None = None,
) -> Tensor:
    """`F.alpha_dropout` or `F.feature_alpha_dropout`, which keep the mean and variance of SELU units.

    Klambauer et al., Self-Normalizing Neural Networks, 2017, https://arxiv.org/abs/1706.02515
    """
    if not (training if train is None else train):
        return input
    kind = func.__name__
    if "feature" in kind:
        keep = _keep_channels(masks, kind, input, p)
    else:
        keep = masks.keep(kind, tuple(input.shape), p, input.device, axis=-1)
    if keep is None:
        return input
    p = masks.calls[-1].p
    if p == 1.0:
        return _written(masks, func, input, input * 0, inplace)
    a = ((1 - p) * (1 + p * _ALPHA**2)) ** -0.5
    kept = keep.to(input.dtype)
    return _written(masks, func, input, a * (input * kept + _ALPHA * (1 - kept)) - a * p * _ALPHA, inplace)


def _written(masks: Masks, func: Callable[..., Tensor], input: Tensor, dropped: Tensor, inplace: bool) -> Tensor:
    """What a dropout function returns; the input is read as that from then on, if it drops in place."""
    if inplace or func.__name__.endswith("_"):
        masks.write(input, dropped)
    return dropped


def _keep_channels(masks: Masks, kind: str, input: Tensor, p: float) -> Tensor | None:
    """The mask of whole channels, broadcastable to the input, (batch, channels, ...), or None if nothing is dropped.

    Volumes may have no batch axis, as in torch: (channels, depth, height, width).
    """
    if input.ndim < 3:
        raise ValueError(
            f"{kind} in {described(masks.place())} got {tuple(input.shape)}: it needs (batch, channels, ...), with "
            f"at least one axis after the channels"
        )
    units = input.shape[: 1 if kind == "dropout3d" and input.ndim == 4 else 2]  # ([batch,] channels)
    keep = masks.keep(kind, tuple(units), p, input.device, axis=-1)
    return None if keep is None else keep.reshape(*keep.shape, *[1] * (input.ndim - len(units)))
