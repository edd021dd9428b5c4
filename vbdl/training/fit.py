"""Training: every posterior by its own loss, all members of an ensemble in one stacked step.

The step (forward, backward, and the changes of buffers) is traced once a batch shape and compiled like a prediction.
Members share nothing but the step: each has its initialization, its order of the data, its gradient norm and its
early stopping, so that the result is that of training them one by one, to float rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vbdl.calling.stacking import replicate
from vbdl.data.rows import check_rows, outside_range, whole
from vbdl.training.options import TrainingOptions
from vbdl.training.row_checks import check_predictable
from vbdl.training.run import History, TrainingRun
from vbdl.types import Likelihood, Posterior, check_likelihood, is_posterior


def fit(
    posterior: Posterior,
    data: Any,
    likelihood: Likelihood,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | str | None = None,
    validation: float | tuple[Any, Any] | None = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    kl_warmup: int = 0,
    bootstrap: bool = False,
    member_rows: Tensor | None = None,
    seed: int = 0,
    compile: bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool | None = None,
) -> History:
    """Train a posterior and its likelihood in place.

    data: (inputs, targets) as tensors or arrays, a Dataset, or a DataLoader. With a DataLoader all members see its
        batches; with anything else each has an order of its own.
    optimizer: parameters -> optimizer, one that treats each number on its own (Adam, SGD, ...); AdamW(lr,
        weight_decay) unless given.
    schedule: optimizer -> learning-rate schedule, stepped once an epoch; "cosine" anneals to zero.
    validation: a share of the rows to hold out, or (inputs, targets). Each member keeps the epoch with the best
        validation likelihood, and stops after `patience` epochs without a better one.
    clip_norm: largest gradient norm of a member.
    kl_warmup: epochs over which the weight of the KL term rises from 0 to its value.
    bootstrap: each member trains on its own resample of the rows.
    member_rows: (members, n) the rows each member trains on, in place of all.
    seed: of orders and resamples; member m uses seed + m. (Dropout and weights draw from the posterior's seed.)
        torch's own generator is left as it was.
    compile: compile the step; unless given, where there are steps enough to pay for it.
    checkpoint: a file to save to every `checkpoint_every` epochs, and to go on from if it is there: the result is that
        of an uninterrupted run.

    Raises ValueError for bad data, and before the first step for what a predictor would refuse, like a network that
    cannot be traced or that mixes rows; FloatingPointError where the loss stops being finite.
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
        compile=compile,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    if not is_posterior(posterior):
        raise TypeError(
            f"fit trains a posterior, got {type(posterior).__name__}: wrap the network in vbdl.MCDropout, "
            f"vbdl.MeanField or vbdl.DeepEnsemble"
        )
    check_likelihood(likelihood)
    _check_gradients(posterior)
    try:
        if len(posterior.parts) > 1:
            return _fit_parts(posterior, data, likelihood, options)
        return TrainingRun(posterior, data, likelihood, options).run()
    except (IndexError, RuntimeError) as error:
        inputs = data[0] if isinstance(data, tuple | list) else None
        if (said := outside_range(inputs, error, (part.module for part in posterior.parts))) is None:
            raise
        raise said from error


def _check_gradients(posterior: Posterior) -> None:
    """ValueError for an embedding whose gradients are sparse, which neither Adam, a KL term nor clipping can take, and
    for hooks of gradients, which the posterior's copy of the network has not."""
    for part in posterior.parts:
        if hooks := part.lost_hooks:
            raise ValueError(
                f"parameter '{hooks[0]}' has a hook of its gradient (register_hook), which the posterior's copy of the "
                f"network does not carry: mask the parameter by torch.nn.utils.parametrize, or freeze it with "
                f"requires_grad_(False)"
            )
        for name, m in part.module.named_modules():
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse and m.weight.requires_grad:
                raise ValueError(
                    f"module '{name}' ({type(m).__name__}) has sparse gradients, which fit cannot train with: make it "
                    f"with sparse=False"
                )


def _fit_parts(posterior: Posterior, data: Any, likelihood: Likelihood, options: TrainingOptions) -> History:
    """Members of different architectures: one architecture after the other."""
    import copy

    if options.checkpoint is not None or options.member_rows is not None:
        raise ValueError("checkpoint and member_rows need members of one architecture")
    if not isinstance(data, DataLoader):
        data = whole(data)
        check_rows(*data)
        check_predictable(posterior, likelihood, data[0])  # all of them before the first is trained
    total, trained, start = History(), [], 0
    for part in posterior.parts:
        own = copy.deepcopy(likelihood)
        part_options = replace(options, seed=options.seed + start, holdout_seed=options.seed)
        one = TrainingRun(part, data, own, part_options).run()
        trained.append(own)
        start += part.n_members
        total.best_epoch += one.best_epoch
        total.epochs = max(total.epochs, one.epochs)
        total.seconds += one.seconds
        total.compile_seconds += one.compile_seconds
        for mine, theirs in ((total.train_loss, one.train_loss), (total.validation_nll, one.validation_nll)):
            for epoch, values in enumerate(theirs):
                if epoch < len(mine):
                    mine[epoch] = mine[epoch] + values
                else:
                    mine.append(values)
    replicate(likelihood, start)
    with torch.no_grad():
        for name, p in likelihood.named_parameters():
            p.copy_(torch.cat([dict(own.named_parameters())[name] for own in trained]))
    return total
