"""The running statistics of batch normalization for several draws of the weights, by one pass over the rows.

Statistics belong to a draw: those of other weights, like the mean, are wrong for it (Maddox et al. 2019, section 4).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vbdl.calling.each import call_each
from vbdl.calling.inputs import tensors
from vbdl.calling.mapping import why_not_mapped
from vbdl.calling.stacking import call_stacked
from vbdl.calling.traversing import state_of
from vbdl.nn.frozen import frozen_modules
from vbdl.nn.normalization import NORMALIZATION_LAYERS
from vbdl.types import Inputs, State

_ROWS = 4096  # rows times draws in one call


def statistics_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of every normalization with running statistics that is not frozen."""
    frozen = {name for name, _ in frozen_modules(module)}
    for name, m in module.named_modules():
        if isinstance(m, NORMALIZATION_LAYERS) and m.running_mean is not None and name not in frozen:
            yield name, m


def statistics_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the running means and variances of these layers."""
    leaves = ("running_mean", "running_var")
    return tuple(f"{name}.{leaf}" if name else leaf for name, _ in statistics_layers(module) for leaf in leaves)


@torch.no_grad()
def measure_statistics(
    network: nn.Module, draws: State, names: Iterable[str], data: Iterable[tuple[Inputs, Tensor]]
) -> State:
    """The running statistics of each draw, (draws, channels) each by name.

    The mean over the batches of each batch's mean and unbiased variance, weighted by their rows, as
    `torch.optim.swa_utils.update_bn` computes for batches of one size.

    network: left in evaluation mode. draws: the entries of the draws, (draws, ...) each. names: of the buffers of
    running statistics in `network`. data: batches of (inputs, targets).
    """
    state = {name: t.clone() for name, t in state_of(network).items()}
    count = next(iter(draws.values())).shape[0]
    statistics = {name: torch.zeros_like(state[name]).expand(count, -1).clone() for name in names}
    shared = {name: t for name, t in state.items() if name not in draws and name not in statistics}
    layers = [(m, m.momentum) for _, m in statistics_layers(network)]
    network.eval()
    seen, execute = 0, None
    try:
        for m, _ in layers:
            m.train()
        for x, _ in data:
            rows = tensors(x)[0].shape[0]
            seen += rows
            for m, _ in layers:
                m.momentum = rows / seen  # type: ignore[assignment]
            step = max(1, _ROWS // rows)
            for start in range(0, count, step):
                some = {name: t[start : start + step] for name, t in {**draws, **statistics}.items()}
                if execute is None:
                    execute = call_each if why_not_mapped(network, some, shared, x) else call_stacked
                execute(network, some, shared, x)
    finally:
        for m, momentum in layers:
            m.momentum = momentum  # type: ignore[assignment]
        network.eval()
    return statistics
