"""Training of posteriors: each by its own loss, members of an ensemble in one stacked step or in turn.

The step (forward, backward, and updates of buffers) is traced once per batch shape and compiled like a prediction, in
the background; members with large values pass through each epoch one after the other.
Members share only the step: each has its own initialization, order of the rows, gradient norm and early stopping, so
that the result is that of training them one by one, up to float rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from vbdl.calling.checks import check_values
from vbdl.calling.likelihood_members import replicate
from vbdl.data.rows import Data, check_sizes, outside_range, whole
from vbdl.data.stored import in_file
from vbdl.training.options import TrainingOptions, is_of_each_member
from vbdl.training.row_checks import check_predictable
from vbdl.training.run import History, TrainingRun
from vbdl.types import Likelihood, Posterior, check_likelihood, is_posterior


def fit(
    posterior: Posterior,
    data: Data,
    likelihood: Likelihood,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float | Sequence[float] | None = None,
    weight_decay: float | Sequence[float] = 0.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | str | None = None,
    validation: float | Data | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    kl_warmup: int = 0,
    bootstrap: bool = False,
    member_rows: Tensor | None = None,
    seed: int = 0,
    accumulate: int = 1,
    precision: str = "float32",
    auxiliary: Mapping[str | int, float] | None = None,
    compile: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool | None = None,
    processes: "ProcessGroup | DeviceMesh | bool | None" = None,
) -> History:
    """Train a posterior and its likelihood in place.

    epochs: passes over the rows. 0 for a posterior of a trained network, such as `vbdl.Laplace`: the network stays as
        it is, and the posterior is fitted to it.
    data: (inputs, targets) as tensors or arrays, a Dataset, or a DataLoader of pairs or of dicts with "labels". All
        members see the batches of a DataLoader; of any other data each member has its own order of the rows.
        Memory-mapped arrays are read batch by batch, and converted to the network's dtype.
    optimizer: function of the parameters that returns an optimizer with elementwise updates (Adam, SGD, ...),
        because members are stacked; one that torch does not have is tried on two small tensors before.
        AdamW(lr, weight_decay) unless given. `IVON` has an update rule of its own, and takes none.
    lr, weight_decay: of AdamW, by default 1e-3 (`IVON`: 0.1) and 0; a sequence gives each member its own, as in
        hyper-deep ensembles (Wenzel et al. 2020, https://arxiv.org/abs/2006.13570), which train in one stacked step
        too. A schedule changes every member's rate.
    schedule: function of the optimizer that returns a learning-rate schedule, stepped once per epoch; "cosine" anneals
        to zero. `Snapshots` and a cyclical `SWAG` set the learning rate themselves, and refuse a schedule.
    validation: a share of the rows to hold out, or (inputs, targets). Each member keeps the state of the epoch with
        its best validation likelihood, and stops after `patience` epochs without improvement. A posterior made of the
        weights of many epochs (`SWAG`, `Snapshots`) stops early only before the first of them, and goes on from the
        best epoch; after that, validation only records the likelihood of the weights in training. Members that share
        trained parameters (`BatchEnsemble`, `Masksembles`) stop together, by the likelihood of their mixture.
    clip_norm: the largest gradient norm of each member, and of the parameters that members share.
    kl_warmup: epochs over which the weight of the KL term rises from 0 to its value.
    bootstrap: train each member on its own bootstrap resample of the rows.
    member_rows: (members, n) row numbers that each member trains on, instead of all rows.
    seed: of the row orders and resamples; member m uses seed + m. (Dropout masks and weights are drawn from the
        posterior's seed.) torch's global generator is left unchanged.
    accumulate: batches whose gradients are averaged for one update, as of one batch of all their rows; an epoch's last
        update takes what is left.
    precision: "bfloat16" runs the network in bfloat16 by autocast where the processor or card has instructions for it;
        parameters, likelihood and updates stay as they are.
    auxiliary: weights in the loss of further outputs that the network returns in training, by name or index, such as
        {"aux_logits": 0.4} for Inception; each under the same likelihood. `history` has the sum.
    compile: True compiles the step before it runs, False never. By default the step is traced from 300 steps on, and
        compiled in the background if its graph and the number of steps say that this repays the time; the compiled
        code takes over at a step that follows from the graph alone, so that a training repeats bit for bit.
    checkpoint: a file to save to every `checkpoint_every` epochs, and to resume from if it exists: the result is that
        of an uninterrupted run. A training that is interrupted (Ctrl-C) leaves the posterior in evaluation mode, as
        trained so far; members that train one after the other then differ by up to one epoch.

    Raises ValueError for bad data and, before the first step, for a network that a predictor would refuse, like one
    that cannot be traced or that mixes rows; FloatingPointError if the loss becomes NaN or infinite.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> q, likelihood = vbdl.DeepEnsemble(net, 3), vbdl.Categorical()
    >>> history = vbdl.fit(q, (x, y), likelihood, epochs=10, compile=False)
    >>> len(history.train_loss), len(history.train_loss[0])  # epochs, members
    (10, 3)
    """
    options = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        validation=validation,
        patience=patience,
        clip_norm=clip_norm,
        kl_warmup=kl_warmup,
        bootstrap=bootstrap,
        member_rows=member_rows,
        seed=seed,
        accumulate=accumulate,
        precision=precision,
        auxiliary=auxiliary,
        compile=compile,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        processes=processes,
    )
    if not is_posterior(posterior):
        raise TypeError(
            f"fit trains a posterior, got {type(posterior).__name__}: wrap the network in vbdl.MCDropout, "
            f"vbdl.MeanField or vbdl.DeepEnsemble"
        )
    if isinstance(data, Likelihood):
        raise TypeError("fit takes the rows before the likelihood: fit(posterior, (x, y), likelihood)")
    check_likelihood(likelihood)
    check_values(posterior)
    _check_gradients(posterior)
    try:
        for part in posterior.parts:
            part.being_trained(True)
        if len(posterior.parts) > 1:
            return _fit_parts(posterior, data, likelihood, options)
        return TrainingRun(posterior, data, likelihood, options).run()
    except (IndexError, RuntimeError) as error:
        inputs = data[0] if isinstance(data, tuple | list) else None
        if (range_error := outside_range(inputs, error, (part.module for part in posterior.parts))) is None:
            raise
        raise range_error from error
    finally:
        for part in posterior.parts:
            part.being_trained(False)


def _check_gradients(posterior: Posterior) -> None:
    """Raise ValueError for sparse gradients of an embedding and for gradient hooks.

    Adam, a KL term and clipping cannot take sparse gradients; the posterior's copy of the network lacks the hooks.
    """
    for part in posterior.parts:
        if hooks := part.lost_hooks:
            raise ValueError(
                f"parameter '{hooks[0]}' has a gradient hook (register_hook), which the posterior's copy of the "
                f"network does not have: mask the parameter with torch.nn.utils.parametrize, or freeze it with "
                f"requires_grad_(False)"
            )
        for name, m in part.module.named_modules():
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse and m.weight.requires_grad:
                raise ValueError(
                    f"module '{name}' ({type(m).__name__}) has sparse gradients, which fit cannot train with: build it "
                    f"with sparse=False"
                )


def _fit_parts(posterior: Posterior, data: Data, likelihood: Likelihood, options: TrainingOptions) -> History:
    """Train members of different architectures, one architecture after the other."""
    import copy

    if options.checkpoint is not None or options.member_rows is not None:
        raise ValueError("checkpoint and member_rows need members of one architecture: leave them out")
    for name in ("lr", "weight_decay"):
        if is_of_each_member(given := getattr(options, name)) and len(given) != posterior.n_members:
            raise ValueError(
                f"{name} must be one number, or one for each of {posterior.n_members} members; got {len(given)}"
            )
    if not isinstance(data, DataLoader) and not in_file(data):
        data = whole(data)
        check_sizes(*data)
        check_predictable(posterior, likelihood, data[0])  # check all architectures before the first is trained
    total, likelihoods, start = History(), [], 0
    for part in posterior.parts:
        part_likelihood = copy.deepcopy(likelihood)
        members = slice(start, start + part.n_members)
        each = {
            name: given[members]
            for name in ("lr", "weight_decay")
            if is_of_each_member(given := getattr(options, name))
        }
        part_options = replace(options, seed=options.seed + start, holdout_seed=options.seed, **each)
        history = TrainingRun(part, data, part_likelihood, part_options).run()
        likelihoods.append(part_likelihood)
        start += part.n_members
        total.best_epoch += history.best_epoch
        total.epochs = max(total.epochs, history.epochs)
        total.seconds += history.seconds
        total.compile_seconds += history.compile_seconds
        total.one_by_one = total.one_by_one or history.one_by_one
        for joined, added in (
            (total.train_loss, history.train_loss),
            (total.validation_nll, history.validation_nll),
        ):
            for epoch, values in enumerate(added):
                if epoch < len(joined):
                    joined[epoch] = joined[epoch] + values
                else:
                    joined.append(values)
    replicate(likelihood, start)
    with torch.no_grad():
        for name, p in likelihood.named_parameters():
            p.copy_(torch.cat([dict(trained.named_parameters())[name] for trained in likelihoods]))
    return total
