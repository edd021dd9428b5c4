"""The epochs of one training: steps, validation, checkpoints, and the state of the posterior afterwards."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from vbdl.calling.copies import forget
from vbdl.calling.inputs import tensors as tensors_of
from vbdl.calling.likelihood_members import replicate
from vbdl.calling.traversing import state_of
from vbdl.data.rows import Data
from vbdl.model import Model
from vbdl.nn.members import StackedPosterior
from vbdl.progress import Progress
from vbdl.training.adamw import FusedAdamW
from vbdl.training.batches import TrainingData
from vbdl.training.checkpoint import load_checkpoint, save_checkpoint
from vbdl.training.early_stopping import BestEpochs
from vbdl.training.in_turn import MemberStep, trains_in_turn
from vbdl.training.optimization import (
    MeanGradients,
    clip_gradients,
    clip_members,
    make_optimizer,
    make_schedule,
    own_optimizer,
)
from vbdl.training.options import TrainingOptions, is_of_each_member
from vbdl.training.processes import Processes, Sharing, digest
from vbdl.training.row_checks import RowChecks
from vbdl.training.step import Losses, Step
from vbdl.training.validation import Validation
from vbdl.types import Inputs, Likelihood, Posterior

logger = logging.getLogger("vbdl")

_EQUAL = (
    "give fit the same in every process; seed torch with torch.manual_seed before the network and the data are made"
)
_BATCHES = (
    "every process needs the same batches, because vbdl shares out members or rows itself: leave out "
    "DistributedSampler, and seed what shuffles or draws"
)


@dataclass
class History:
    """The losses and times of a training, one entry per epoch.

    train_loss, validation_nll: (epochs, members), nats per row; the latter is empty without validation rows.
    best_epoch: (members,), the number of the epoch whose state was kept, -1 for the last.
    epochs: those that were trained, fewer than asked for if training stopped early.
    seconds: of the training; compile_seconds: of them, those for tracing and for waiting for the compiler.
    one_by_one: why members were trained one after the other, or "".
    """

    train_loss: list[list[float]] = field(default_factory=list)  # (epochs, members) nats per row
    # (epochs, members) nats per row; members that train shared parameters all have the loss of their mixture
    validation_nll: list[list[float]] = field(default_factory=list)
    best_epoch: list[int] = field(default_factory=list)  # (members,) epoch whose state was kept, -1 for the last
    epochs: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0  # time spent tracing and waiting for the compiler, part of `seconds`
    one_by_one: str = ""  # why members were trained one after the other, or "" if they were trained together


class TrainingRun:
    """One training run of a posterior whose members have one architecture."""

    def __init__(self, posterior: Posterior, data: Data, likelihood: Likelihood, options: TrainingOptions):
        if options.epochs == 0 and not posterior.fits_trained:
            raise ValueError(
                f"epochs must be at least 1 for {type(posterior).__name__}, which has nothing to fit to a trained "
                f"network: predict with it as it is, or train it"
            )
        if options.lr is None:
            options = replace(options, lr=posterior.learning_rate)
        self.posterior, self.likelihood, self.options = posterior, likelihood, options
        self.members: int = posterior.n_members
        separate = bool(posterior.by_member)  # whether members have their own rows, gradient norms and early stopping
        if separate:
            replicate(likelihood, self.members)
        self.model = Model(posterior, likelihood)
        self.device = self.model.device
        self.processes = Processes(options.processes, self.device)
        self.sharing = sharing = Sharing(self.processes, posterior, likelihood)
        checks = RowChecks(self.model, options.seed)
        self.data = TrainingData(data, options, self.members, sharing.members, separate, checks)
        self.processes.check_alike(sharing.alike(options, self.data.hashes), _EQUAL)
        self.shown = self.processes.shown(options.progress)
        # what this process trains: the whole posterior, or its members alone, whose tensors are parts of the whole
        self.trainee = sharing.posterior
        self.losses = Losses(self.trainee, sharing.likelihood, self.data.own_rows, options.of_steps(self.device))
        self._expected = lambda rows: options.epochs * self.data.steps_with(rows)
        self.step = Step(self.losses, options.compile, self._expected)
        self.trained = self.step.trained
        self.validate = None
        if self.data.validation is not None:
            together = separate and any(name not in self.model.by_member for name in self.trained)
            self.validate = Validation(self.model, options.seed, self.data.validation, sharing, together)
        undecayed = {f"posterior.{name}" for name in posterior.undecayed}
        mine = sharing.of_my_members(options)
        self.optimizer = own_optimizer(mine, self.trainee, self.trained) or make_optimizer(
            mine, self.trained, undecayed, self.model.by_member, len(sharing.members)
        )
        self.course = self.trainee.course(options.epochs, self.optimizer.param_groups[0]["lr"])
        self._check_course()
        self.schedule = make_schedule(options, self.optimizer)
        self.rates: list[float] = [group["lr"] for group in self.optimizer.param_groups]
        self._gradients = MeanGradients(self.trained.values())
        self.history = History()
        self.best = BestEpochs(self.members, options.patience, self.model.by_member, sharing.members)
        self.position = 0  # the number of the next epoch
        self._begun = False  # whether `before_training` was called
        self._in_turn: bool | None = None  # whether members train one after the other; None: not known yet
        self.kl_weight = self.trainee.kl_weight

    def _check_course(self) -> None:
        """Raise ValueError for options that contradict what the method asks of the epochs."""
        method = type(self.posterior).__name__
        if self.course.rate is not None and self.options.schedule is not None:
            raise ValueError(
                f"{method} sets the learning rate of every step itself: leave schedule= out, and choose the largest "
                f"rate with lr="
            )
        if self.course.collects_from == 0 and self.options.patience is not None:
            raise ValueError(
                f"{method} is made of the weights of many epochs from the first on, so no epoch is the best one to "
                f"stop at: leave patience= out; validation= then only records"
            )

    def _set_kl(self, epoch: int) -> None:
        warm = self.options.kl_warmup
        if self.kl_weight is not None and warm:
            self.trainee.kl_weight = self.kl_weight * min(1.0, epoch / warm)

    def run(self) -> History:
        begun = time.perf_counter()
        options, history = self.options, self.history
        self._resume()
        self.trainee.train()
        try:
            with torch.inference_mode(False), torch.enable_grad():  # also inside a caller's no_grad or inference_mode
                self._epochs()
        finally:  # also if the training was interrupted: the parameters have changed
            self._leave()
        if options.checkpoint is not None:
            self._save()
        self.best.restore(state_of(self.losses))
        self.trainee.being_trained(False)
        trained = Model(self.trainee, self.sharing.likelihood)
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            self._seed((options.seed * 1_000_003 + options.epochs) % 2**63)  # for the order of a DataLoader
            self.trainee.after_training(trained, self.data.passes("pass over the data", self.shown))
        self.sharing.complete(self.model.by_member)
        self._record_rows()
        history.best_epoch = self.best.epoch.tolist()
        history.compile_seconds += self.step.compile_seconds
        history.seconds += time.perf_counter() - begun
        return history

    def _epochs(self) -> None:
        options, history = self.options, self.history
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), Progress("training", options.epochs, self.shown) as bar:
            bar.done = history.epochs
            while (epoch := self.position) < options.epochs:
                self._seed((options.seed * 1_000_003 + epoch) % 2**63)
                self._set_kl(epoch)
                self._epoch(epoch)
                self.trainee.after_epoch(epoch)
                note = f"loss {sum(history.train_loss[-1]) / self.members:.4g}"
                if history.one_by_one:
                    note += ", members one by one"
                if self.validate is not None:
                    nll = self.validate()
                    history.validation_nll.append(nll.tolist())
                    if self._may_stop(epoch):
                        self.best.update(epoch, nll, state_of(self.losses))
                        # the epochs until early stopping if no member improves, and those that are collected
                        collecting = options.epochs - self._last
                        bar.total = self.best.last(self._last) + collecting
                        history.best_epoch = self.best.epoch.tolist()
                    note += f", validation {float(nll.mean()):.4g}"
                if self.schedule is not None:
                    self.schedule.step()
                history.epochs += 1
                bar.advance(note)
                self.position = self._next(epoch)
                if options.checkpoint is not None and history.epochs % options.checkpoint_every == 0:
                    self._save()

    def _seed(self, seed: int) -> None:
        """Seed torch's generators, for modules that draw from them."""
        if self.device.type == "cpu":  # torch.manual_seed takes as long as some steps, to seed devices without a part
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    @property
    def _last(self) -> int:
        """The number of epochs in which early stopping may stop."""
        collects_from = self.course.collects_from
        return self.options.epochs if collects_from is None else collects_from

    def _may_stop(self, epoch: int) -> bool:
        """Whether this epoch may be the best one: the posterior is not made of the weights of several."""
        return epoch < self._last

    def _next(self, epoch: int) -> int:
        """The number of the epoch after this one; `options.epochs` if training stops.

        Before weights are collected, the members go back to their best epochs.
        """
        if not self._may_stop(epoch):
            return epoch + 1
        following = self._last if self.best.done else epoch + 1
        if following == self.course.collects_from:
            self.best.restore(state_of(self.losses))
            self.best.kept.clear()
        return following

    def _leave(self) -> None:
        """Put the posterior in evaluation mode, remove what training kept, and record the rows trained on."""
        if self.kl_weight is not None and self.options.kl_warmup:
            self.trainee.kl_weight = self.kl_weight
        self.step.end()
        if isinstance(self.trainee, StackedPosterior):
            self.trainee.end_turns()
        self.trainee.eval()
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
        batches: Iterator[tuple[Inputs, Tensor]] = iter(())
        if not self._begun:
            batches = self.data.epoch(epoch)
            first = next(batches)
            self._begin(*first)
            batches = chain([first], batches)
        elif not isinstance(self.step, MemberStep):
            batches = self.data.epoch(epoch)
        self.step.begin_epoch()
        if isinstance(self.step, MemberStep):
            mine = self._epoch_in_turn(epoch, self.step)
        else:
            mine = self._epoch_together(epoch, batches)
        means = self.sharing.of_all(mine).tolist()
        bad = [m for m, value in enumerate(means) if not math.isfinite(value)]
        if bad:
            rates = self.options.lr
            lr = rates[bad[0]] if is_of_each_member(rates) else self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss of member {bad[0]} became {means[bad[0]]} in epoch {epoch} (learning rate {lr:g}): "
                f"standardize inputs and targets, lower lr, or set clip_norm"
            )
        self.history.train_loss.append(means)

    def _begin(self, x: Inputs, y: Tensor) -> None:
        """Find out on the first batch how the members are trained."""
        own = self.data.own_rows
        if not own:
            self.processes.check_alike({"the first batch": digest(*tensors_of(x), y)}, _BATCHES)
        self.trainee.before_training(x, y, self.sharing.likelihood, own)
        self.sharing.check_step(self.losses, x, y, own)
        self._begun = True
        self._say_one_by_one()
        plain = type(self.optimizer) is FusedAdamW and self.options.accumulate == 1 and not self.sharing.by_rows
        can = plain and bool(self.data.of_members(0))
        if self._in_turn is None:  # a resumed training goes on as it began, whatever its next batch looks like
            traced = self.step.is_traced(y)
            self._in_turn = can and trains_in_turn(self.losses, x, y, self.trained, self.model.by_member, traced)
        if can and self._in_turn:
            progress, self.step = self.step.progress(), MemberStep(self.losses, self.options.compile, self._expected)
            self.step.resume(progress)

    def _epoch_together(self, epoch: int, batches: Iterable[tuple[Inputs, Tensor]]) -> Tensor:
        """Train all members on the batches of an epoch; returns the mean loss of each, (members,)."""
        total = torch.zeros(len(self.sharing.members), device=self.device)
        rows, several = 0, self.options.accumulate if self.options.accumulate > 1 else 0
        for number, (x, y) in enumerate(batches):
            self._set_rate(epoch, number)
            losses = self.sharing.step(self.step, self.trained, x, y, self.data.own_rows, number)
            n = self.losses.rows(y)
            if not several:
                self._update()
            else:
                self._gradients.add(n)
                if (number + 1) % several == 0:
                    self._update()
            total.add_(losses, alpha=n)
            rows += n
        if several and self._gradients.rows:
            self._update()
        return total / max(rows, 1)

    def _epoch_in_turn(self, epoch: int, step: MemberStep) -> Tensor:
        """Train one member after the other on its batches of an epoch; returns the mean loss of each, (members,)."""
        assert isinstance(self.optimizer, FusedAdamW)
        members, means = self.data.of_members(epoch), []
        turns = self.optimizer.turns(len(self.sharing.members))
        assert members is not None and turns is not None
        for member, (batches, turn) in enumerate(zip(members, turns, strict=True)):
            total, rows = torch.zeros((), device=self.device), 0
            step.begin(member)
            for number, (x, y) in enumerate(batches):
                self._set_rate(epoch, number)
                loss, gradients = step.gradients(x, y)
                if self.options.clip_norm is not None:
                    clip_members([g.unsqueeze(0) for g in gradients.values()], self.options.clip_norm)
                turn.step(gradients)
                n = y.shape[0]
                total.add_(loss, alpha=n)
                rows += n
            means.append(total / rows)
        step.end_epoch()
        self.optimizer.counted(turns[0])
        return torch.stack(means)

    def _update(self) -> None:
        """Do the optimizer's step, with the gradients of all batches since the last one."""
        if self._gradients.rows:
            self._gradients.put()
        if self.options.clip_norm is not None:
            clip_gradients(self.trained, self.options.clip_norm, self.model.by_member)
        self.optimizer.step()

    def _set_rate(self, epoch: int, step: int) -> None:
        """Set the learning rate of a step, if the method chooses it."""
        if self.course.rate is None:
            return
        steps = len(self.data)  # 1 for a stream of unknown length, whose rate is constant within an epoch
        factor = self.course.rate(epoch + min(step, steps - 1) / steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _say_one_by_one(self) -> None:
        """Log and record why members are trained one after the other, if they are."""
        reason = self.trainee.one_by_one
        if reason and self.members > 1:
            self.history.one_by_one = reason
            logger.info("the members are trained one after the other, which is slower than together: %s", reason)

    # -- checkpoints

    def _save(self) -> None:
        tensors = {f"model.{n}": t for n, t in state_of(self.losses).items()} | self.best.tensors()
        if self.data.fingerprints:
            tensors["rows"] = torch.cat(self.data.fingerprints).unique()
        path, first = self.options.checkpoint, self.processes.rank == 0
        steps = {**self.step.progress(), "in turn": self._in_turn}
        state = self.optimizer, self.schedule, self.history, self.position, steps
        save_checkpoint(path, tensors, *state, self._whole if self.sharing.by_members else None, first)

    def _by_member(self, name: str, t: Tensor) -> bool:
        """Whether a tensor of a checkpoint has a leading members axis. name: its name there."""
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            names = {id(p): n for n, p in self.trained.items()}
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            rest = names[id(parameters[int(rest.partition(".")[0])])]
        return kind in ("model", "kept", "optimizer") and rest in self.model.by_member and t.ndim > 0

    def _whole(self, name: str, t: Tensor) -> Tensor:
        return self.sharing.to_first(t, self._by_member(name, t))

    def _part(self, name: str, t: Tensor) -> Tensor:
        return self.sharing.of_mine(t, self._by_member(name, t))

    def _resume(self) -> None:
        path = self.options.checkpoint
        if path is None or not Path(path).exists():
            return
        tensors, epoch, history, steps = load_checkpoint(
            path, self.optimizer, self.schedule, self._part if self.sharing.by_members else None
        )
        if (rows := tensors.pop("rows", None)) is not None:  # resuming a finished run reads no batch to fingerprint
            self.data.fingerprints.append(rows)
        state = state_of(self.losses)
        saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(f"the checkpoint {path} is of another model: remove it, or give another path")
        with torch.no_grad():
            for name, t in state.items():
                t.copy_(saved[name])
        self.step.resume(steps)
        self._in_turn = steps.get("in turn")
        self.best.load(tensors, self.device)
        for name, value in history.items():
            setattr(self.history, name, value)
        stopped = self.best.done and self.course.collects_from is None
        self.position = self.options.epochs if stopped else epoch
