"""A whole small network (widths up to 128) in one kernel; each program runs one member, or one draw, on one batch tile.

Activations between layers stay on the chip. It is for networks whose layers take less time than a launch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vbdl_kernels import dispatch
from vbdl_kernels.sampled_linear import reference_sampled_linear, wide_of

WIDEST = 128
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "silu": torch.nn.functional.silu}


def reference_ensemble_mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> Tensor:
    """The specification of `ensemble_mlp`: sums in `wide_of` the dtype, activations rounded to the dtype of x."""
    dtype, wide = x.dtype, wide_of(x.dtype)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x.to(wide) @ weight.to(wide).mT + bias.to(wide)[:, None]
        if i < len(weights) - 1:
            x = ACTIVATIONS[activation](x)
        x = x.to(dtype)
    return x


def reference_bayesian_mlp(
    x: Tensor,
    means: Sequence[Tensor],
    stds: Sequence[Tensor],
    bias_means: Sequence[Tensor],
    bias_stds: Sequence[Tensor],
    key: Tensor,
    layers: Sequence[int],
    bias_layers: Sequence[int],
    activation: str,
) -> Tensor:
    """The specification of `bayesian_mlp`: for each layer `sampled_linear`, then the activation."""
    parameters = zip(means, stds, bias_means, bias_stds, layers, bias_layers, strict=True)
    for i, (mean, std, bias_mean, bias_std, layer, bias_layer) in enumerate(parameters):
        x = reference_sampled_linear(x, mean, std, bias_mean, bias_std, key, layer, "", bias_layer)
        if i < len(means) - 1:
            x = ACTIVATIONS[activation](x.to(wide_of(x.dtype))).to(x.dtype)
    return x


dispatch.define(
    "ensemble_mlp",
    "(Tensor x, Tensor[] weights, Tensor[] biases, str activation) -> Tensor",
    reference_ensemble_mlp,
    lambda x, weights, biases, activation: x.new_empty((weights[0].shape[0], x.shape[-2], weights[-1].shape[1])),
)
dispatch.define(
    "bayesian_mlp",
    "(Tensor x, Tensor[] means, Tensor[] stds, Tensor[] bias_means, Tensor[] bias_stds, Tensor key, int[] layers,"
    " int[] bias_layers, str activation) -> Tensor",
    reference_bayesian_mlp,
    lambda x, means, stds, bias_means, bias_stds, key, *_: x.new_empty((key.shape[0], x.shape[-2], means[-1].shape[0])),
)
dispatch.kernels_in("mlp_kernel", "ensemble_mlp", "bayesian_mlp")


def _mapped_ensemble(call, info, in_dims, x, weights, biases, activation):
    """The vmap rule of `ensemble_mlp`: one call for the whole mapped axis.

    The axis becomes more members if parameters have it, otherwise more batch.
    """
    x_dim, weight_dims, bias_dims, _ = in_dims
    if all(d is None for d in (*weight_dims, *bias_dims)):
        x = x.movedim(x_dim, -3)
        return dispatch.split_batch(call(x.flatten(-3, -2), weights, biases, activation), x.shape[-3:-1]), 0
    lead = lambda tensors, dims: [dispatch.leading(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)]
    weights, biases = lead(weights, weight_dims), lead(biases, bias_dims)
    shape = weights[0].shape[:2]  # (mapped, members)
    if x_dim is not None or x.ndim == 3:
        x = dispatch.leading(x, x_dim, info.batch_size)
        if x.ndim == 3:
            x = x[:, None].expand(-1, shape[1], -1, -1)
        x = x.flatten(0, 1)
    flat = lambda tensors: [t.flatten(0, 1) for t in tensors]
    return call(x, flat(weights), flat(biases), activation).unflatten(0, shape), 0


def _mapped_bayesian(call, info, in_dims, x, means, stds, bias_means, bias_stds, key, *rest):
    if any(d is not None for dims in in_dims[1:5] for d in dims):  # parameters per ensemble member
        return dispatch.one_by_one(call, info, in_dims, x, means, stds, bias_means, bias_stds, key, *rest)
    whole = lambda x, key: call(x, means, stds, bias_means, bias_stds, key, *rest)
    return dispatch.map_draws(whole, info.batch_size, x, in_dims[0], key, in_dims[5])


dispatch.batching("ensemble_mlp", _mapped_ensemble)
dispatch.batching("bayesian_mlp", _mapped_bayesian)


@dispatch.kept_whole("ensemble_mlp")
def _ensemble_mlp(x, weights, biases, activation):
    if dispatch.wants_derivative(x, weights, biases):
        return reference_ensemble_mlp(x, weights, biases, activation)
    return torch.ops.vbdl.ensemble_mlp(x, weights, biases, activation)


@dispatch.kept_whole("bayesian_mlp")
def _bayesian_mlp(x, means, stds, bias_means, bias_stds, key, *rest):
    if dispatch.wants_derivative(x, means, stds, bias_means, bias_stds):
        return reference_bayesian_mlp(x, means, stds, bias_means, bias_stds, key, *rest)
    return torch.ops.vbdl.bayesian_mlp(x, means, stds, bias_means, bias_stds, key, *rest)


def _check(x: Tensor, stacked: int, shapes: Sequence[torch.Size], activation: str, tensors: Sequence[Tensor]) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if not shapes:
        raise ValueError("a network needs at least one layer, got none")
    widths = [x.shape[-1], *(shape[-2] for shape in shapes)]
    for width, shape in zip(widths, shapes, strict=False):
        if shape[-1] != width:
            sizes = [x.shape[-1], *(tuple(s) for s in shapes)]
            raise ValueError(
                f"widths {sizes} do not follow each other: a layer needs as many inputs as the one before has outputs"
            )
    if max(widths) > WIDEST:
        raise ValueError(f"widths must be up to {WIDEST}, got {widths}: use sampled_linear or a batched product")
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != stacked):
        raise ValueError(f"x must be (batch, in) or ({stacked}, batch, in), got {tuple(x.shape)}")
    if len({(t.dtype, t.device) for t in (x, *tensors)}) > 1:
        raise ValueError("x and all parameters must have one dtype and be on one device")


def _autocast(x: Tensor, *groups: Sequence[Tensor]) -> Any:
    """Apply `dispatch.autocast` to x and to groups of parameters; returns x and a list for each group."""
    x, *flat = dispatch.autocast(x, *(t for group in groups for t in group))  # type: ignore[assignment]
    rest = iter(flat)
    return x, *([next(rest) for _ in group] for group in groups)


def ensemble_mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str = "relu") -> Tensor:
    """Run every member of an ensemble of small networks on a batch.

    x: (batch, in) shared or (members, batch, in);  weights[l]: (members, out, in);  biases[l]: (members, out)
    ->  (members, batch, out of the last layer), before any softmax

    activation: "relu", "tanh" or "silu", after every layer but the last. The kernel is for inference: if a derivative
    is needed, plain torch runs. dtypes and transforms are as in `sampled_linear`; under vmap, mapped parameters become
    more members. Raises ValueError for shapes that do not fit and widths above 128.
    """
    x, weights, biases = _autocast(x, weights, biases)
    if len(weights) != len(biases) or any(b.shape != w.shape[:2] for w, b in zip(weights, biases, strict=True)):
        raise ValueError("weights[l] must be (members, out, in) and biases[l] (members, out), one of each a layer")
    members = weights[0].shape[0] if weights else 0
    if any(w.ndim != 3 or w.shape[0] != members for w in weights):
        raise ValueError(f"every weights[l] must have three axes, the first of {members} members like weights[0]")
    _check(x, members, [w.shape for w in weights], activation, (*weights, *biases))
    return _ensemble_mlp(x, weights, biases, activation)


def bayesian_mlp(
    x: Tensor,
    means: Sequence[Tensor],
    stds: Sequence[Tensor],
    bias_means: Sequence[Tensor],
    bias_stds: Sequence[Tensor],
    key: Tensor,
    layers: Sequence[int],
    activation: str = "relu",
    bias_layers: Sequence[int] | None = None,
) -> Tensor:
    """Run every draw of a small mean-field network on a batch; the drawn weights exist only in registers.

    x: (batch, in) shared or (samples, batch, in);  means[l], stds[l]: (out, in);  bias_means[l], bias_stds[l]: (out,)
    key: (samples, 2) int64  ->  (samples, batch, out of the last layer)

    layers[l], bias_layers[l]: the layer numbers of the noise of weights and biases; bias_layers defaults to layers.
    The draws are those of `sampled_linear` with the same key and layer numbers. Activation, derivatives and errors are
    as in `ensemble_mlp`.
    """
    x, *groups = _autocast(x, means, stds, bias_means, bias_stds)
    bias_layers = layers if bias_layers is None else bias_layers
    if len({*map(len, groups), len(layers), len(bias_layers)}) != 1:
        raise ValueError("means, stds, bias_means, bias_stds and layer numbers must have one entry for each layer")
    means, stds, bias_means, bias_stds = groups
    for mean, std, bias_mean, bias_std in zip(*groups, strict=True):
        if mean.ndim != 2 or mean.shape != std.shape or not bias_mean.shape == bias_std.shape == mean.shape[:1]:
            raise ValueError("means and stds must be (out, in), bias_means and bias_stds (out,)")
    if key.dtype != torch.int64 or key.ndim != 2 or key.shape[-1] != 2:
        raise ValueError(f"key must be int64 of shape (samples, 2), got {key.dtype} {tuple(key.shape)}")
    if not all(0 <= layer < 2**28 for layer in (*layers, *bias_layers)):
        raise ValueError(f"layers {[*layers, *bias_layers]} out of range: use numbers from 0 to 2**28 - 1")
    tensors = [t for group in groups for t in group]
    _check(x, key.shape[0], [m.shape for m in means], activation, tensors)
    return _bayesian_mlp(x, means, stds, bias_means, bias_stds, key, list(layers), list(bias_layers), activation)
