"""The epochs of one training: steps, validation, checkpoints, and the state of the posterior afterwards."""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vbdl.calling.stacking import forget, replicate, state_of
from vbdl.compiling.compiler import can_compile
from vbdl.data.rows import Data
from vbdl.model import Model
from vbdl.progress import Progress
from vbdl.training.batches import TrainingData
from vbdl.training.checkpoint import load_checkpoint, save_checkpoint
from vbdl.training.early_stopping import BestEpochs
from vbdl.training.optimization import clip_gradients, make_optimizer, make_schedule
from vbdl.training.options import TrainingOptions
from vbdl.training.row_checks import RowChecks
from vbdl.training.step import Losses, Step
from vbdl.training.validation import Validation
from vbdl.types import Likelihood, Posterior

logger = logging.getLogger("vbdl")

# below this many steps, compiling (some seconds per batch shape) costs more than it saves
_STEPS_WORTH_COMPILING = 4000


@dataclass
class History:
    """The losses and times of a training, one entry per epoch."""

    train_loss: list[list[float]] = field(default_factory=list)  # (epochs, members) nats per row
    validation_nll: list[list[float]] = field(default_factory=list)  # (epochs, members) nats per row
    best_epoch: list[int] = field(default_factory=list)  # (members,) epoch whose state was kept, -1 for the last
    epochs: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0  # time spent tracing and compiling, part of `seconds`
    one_by_one: str = ""  # why members were trained one after the other, or "" if they were trained together


class TrainingRun:
    """One training run of a posterior whose members have one architecture."""

    def __init__(self, posterior: Posterior, data: Data, likelihood: Likelihood, options: TrainingOptions):
        if options.epochs == 0 and not posterior.fits_trained:
            raise ValueError(
                f"epochs must be at least 1 for {type(posterior).__name__}, which has nothing to fit to a trained "
                f"network: predict with it as it is, or train it"
            )
        self.posterior, self.likelihood, self.options = posterior, likelihood, options
        self.members: int = posterior.n_members
        separate = bool(posterior.by_member)  # whether members have their own rows, gradient norms and early stopping
        if separate:
            replicate(likelihood, self.members)
        self.model = Model(posterior, likelihood)
        self.device = self.model.device
        self.data = TrainingData(data, options, self.members, separate, RowChecks(self.model, options.seed))
        self.validate = None
        if self.data.validation is not None:
            self.validate = Validation(self.model, options.seed, *self.data.validation)
        self.losses = Losses(posterior, likelihood, self.data.own_rows)
        compiled = options.compile
        if compiled is None:
            compiled = can_compile() and options.epochs * len(self.data) >= _STEPS_WORTH_COMPILING
        self.step = Step(self.losses, compiled)
        self.trained = self.step.trained
        self.optimizer = make_optimizer(options, list(self.trained.values()))
        self.schedule = make_schedule(options, self.optimizer)
        self.history = History()
        self.best = BestEpochs(self.members, options.patience, self.model.by_member)
        self.start = 0
        self._begun = False  # whether `before_training` was called
        self.kl_weight = posterior.kl_weight

    def _set_kl(self, epoch: int) -> None:
        warm = self.options.kl_warmup
        if self.kl_weight is not None and warm:
            self.posterior.kl_weight = self.kl_weight * min(1.0, epoch / warm)

    def run(self) -> History:
        begun = time.perf_counter()
        options, history = self.options, self.history
        self._resume()
        self.posterior.train()
        try:
            with torch.inference_mode(False), torch.enable_grad():  # also inside a caller's no_grad or inference_mode
                self._epochs()
        finally:  # also if the training was interrupted: the parameters have changed
            self._leave()
        if options.checkpoint is not None:
            self._save(history.epochs)
        self.best.restore(state_of(self.losses))
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            self.posterior.after_training(self.model, self.data.passes("pass over the data", options.progress))
        self._record_rows()
        history.best_epoch = self.best.epoch.tolist()
        history.compile_seconds += self.step.compile_seconds
        history.seconds += time.perf_counter() - begun
        return history

    def _epochs(self) -> None:
        options, history = self.options, self.history
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), Progress("training", options.epochs, options.progress) as bar:
            bar.done = self.start
            for epoch in range(self.start, options.epochs):
                torch.manual_seed(
                    (options.seed * 1_000_003 + epoch) % 2**63
                )  # for modules that draw from torch's generator
                self._set_kl(epoch)
                self._epoch(epoch)
                self.posterior.after_epoch(epoch)
                note = f"loss {sum(history.train_loss[-1]) / self.members:.4g}"
                if history.one_by_one:
                    note += ", members one by one"
                if self.validate is not None:
                    nll = self.validate()
                    history.validation_nll.append(nll.tolist())
                    self.best.update(epoch, nll, state_of(self.losses))
                    bar.total = self.best.last(options.epochs)  # the epochs until early stopping if no member improves
                    history.best_epoch = self.best.epoch.tolist()
                    note += f", validation {float(nll.mean()):.4g}"
                if self.schedule is not None:
                    self.schedule.step()
                history.epochs = epoch + 1
                bar.advance(note)
                if options.checkpoint is not None and (epoch + 1) % options.checkpoint_every == 0:
                    self._save(epoch + 1)
                if self.best.done:
                    break

    def _leave(self) -> None:
        """Put the posterior in evaluation mode, remove what training kept, and record the rows trained on."""
        if self.kl_weight is not None and self.options.kl_warmup:
            self.posterior.kl_weight = self.kl_weight
        self.posterior.eval()
        forget(self.posterior.module)
        forget(self.likelihood)
        self._record_rows()
        for p in self.trained.values():
            p.grad = None

    def _record_rows(self) -> None:
        """Record the rows seen, which vbdl.calibrate refuses; not as a buffer, which would enter the state dict."""
        before = self.posterior.training_rows
        seen = [*self.data.fingerprints, *([] if before is None else [before])]
        if seen:
            self.posterior.training_rows = torch.cat(seen).unique()

    def _epoch(self, epoch: int) -> None:
        total = torch.zeros(self.members, device=self.device)
        rows = 0
        for x, y in self.data.epoch(epoch):
            self.optimizer.zero_grad()
            if not self._begun:
                self.posterior.before_training(x, y, self.likelihood, self.data.own_rows)
                self._begun = True
                self._say_one_by_one()
            losses = self.step(x, y)
            if self.options.clip_norm is not None:
                clip_gradients(self.trained, self.options.clip_norm, self.model.by_member)
            self.optimizer.step()
            n = y.shape[1] if self.data.own_rows else y.shape[0]
            total += losses * n
            rows += n
        means = (total / max(rows, 1)).tolist()
        bad = [m for m, value in enumerate(means) if not math.isfinite(value)]
        if bad:
            lr = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss of member {bad[0]} became {means[bad[0]]} in epoch {epoch} (learning rate {lr:g}): "
                f"standardize inputs and targets, lower lr, or set clip_norm"
            )
        self.history.train_loss.append(means)

    def _say_one_by_one(self) -> None:
        """Log and record why members are trained one after the other, if they are."""
        reason = self.posterior.one_by_one
        if reason and self.members > 1:
            self.history.one_by_one = reason
            logger.info("the members are trained one after the other, which is slower than together: %s", reason)

    # -- checkpoints

    def _save(self, epoch: int) -> None:
        tensors = {f"model.{n}": t for n, t in state_of(self.losses).items()} | self.best.tensors()
        if self.data.fingerprints:
            tensors["rows"] = torch.cat(self.data.fingerprints).unique()
        save_checkpoint(self.options.checkpoint, tensors, self.optimizer, self.schedule, self.history, epoch)

    def _resume(self) -> None:
        path = self.options.checkpoint
        if path is None or not Path(path).exists():
            return
        tensors, epoch, history = load_checkpoint(path, self.optimizer, self.schedule)
        if (rows := tensors.pop("rows", None)) is not None:  # resuming a finished run reads no batch to fingerprint
            self.data.fingerprints.append(rows)
        state = state_of(self.losses)
        saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(f"the checkpoint {path} is of another model: remove it, or give another path")
        with torch.no_grad():
            for name, t in state.items():
                t.copy_(saved[name])
        self.best.load(tensors, self.device)
        for name, value in history.items():
            setattr(self.history, name, value)
        self.start = self.options.epochs if self.best.done else epoch
