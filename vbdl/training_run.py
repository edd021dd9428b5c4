"""The epochs of one training: its data, steps, validation, checkpoints and what is left behind."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vbdl.checkpoint import load_checkpoint, save_checkpoint
from vbdl.compiler import can_compile
from vbdl.data import Batches, Rows, cannot_take, check_dtype, check_rows, floating_dtype, holdout, take, whole
from vbdl.data import bootstrap as bootstrap_rows
from vbdl.early_stopping import BestEpochs
from vbdl.fingerprint import fingerprints
from vbdl.model import Model
from vbdl.progress import Progress
from vbdl.stacking import (
    Inputs,
    State,
    call,
    call_each,
    call_stacked,
    forget,
    map_inputs,
    replicate,
    select,
    state_of,
    why_not_mapped,
)
from vbdl.step import Losses, Step

# below this many steps, compiling (some seconds a batch shape) costs more than it saves
_STEPS_WORTH_COMPILING = 4000

# draws a member is judged by in validation, where it has draws: their mixture's likelihood, not one draw's
_VALIDATION_DRAWS = 8
_ROWS_COMPARED = 32  # on which mapped draws are compared with draws one after the other, before validation


@dataclass
class History:
    """What happened, an entry an epoch."""

    train_loss: list[list[float]] = field(default_factory=list)  # (epochs, members) nats a row
    validation_nll: list[list[float]] = field(default_factory=list)  # (epochs, members) nats a row
    best_epoch: list[int] = field(default_factory=list)  # (members,) the epoch kept, -1 for the last
    epochs: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0  # of which, for tracing and compiling


class TrainingRun:
    """One call of fit."""

    def __init__(self, posterior: Any, data: Any, likelihood: Any, options: dict[str, Any]):
        self.posterior, self.likelihood, self.o = posterior, likelihood, options
        self.members: int = posterior.n_members
        self.apart = bool(posterior.by_member)  # each member has rows, gradient norm and early stopping of its own
        if self.apart:
            replicate(likelihood, self.members)
        self.model = Model(posterior, likelihood)
        self._begun = False  # whether the posterior has seen a batch of this training
        self._evaluate: Callable[..., Tensor] | None = None  # of all draws, in validation
        self.device = next(posterior.parameters()).device
        self.seen: list[Tensor] = []  # fingerprints of the rows trained on
        self._load(data)
        self.losses = Losses(posterior, likelihood, self.data.own)
        steps = options["epochs"] * len(self.data)
        wanted = options["compile"]
        self.step = Step(self.losses, can_compile() and steps >= _STEPS_WORTH_COMPILING if wanted is None else wanted)
        self.trained = self.step.trained
        make = options["optimizer"]
        if make is None:
            make = lambda ps: torch.optim.AdamW(ps, lr=options["lr"], weight_decay=options["weight_decay"], fused=True)
        self.optimizer = _checked_optimizer(make(list(self.trained.values())))
        self.schedule = self._schedule()
        self.history = History()
        self.best = BestEpochs(self.members, options["patience"], self.model.by_member)
        self.start = 0
        self.kl_weight = posterior.kl_weight

    # -- data

    def _load(self, data: Any) -> None:
        o, seeds = self.o, [self.o["seed"] + m for m in range(self.members)]
        self.validation: tuple[Inputs, Tensor] | None = None
        if o["validation"] is not None and not isinstance(o["validation"], Real):
            self.validation = self._checked(*whole(o["validation"]))
        if isinstance(data, DataLoader):
            if o["bootstrap"] or o["member_rows"] is not None or isinstance(o["validation"], Real):
                raise ValueError(
                    "bootstrap, member_rows and a share for validation pick rows, which a DataLoader does not let us: "
                    "give fit the tensors or the Dataset"
                )
            self.data: Rows | Batches = Batches(data)
            return
        x, y = whole(data)
        check_rows(x, y)
        x, y = self._checked(x, y)
        rows = torch.arange(len(y))
        if isinstance(o["validation"], Real):
            rows, held = holdout(len(y), float(o["validation"]), o.get("held_by", o["seed"]))
            self.validation = take(x, held), y[held]
        if o["member_rows"] is not None:
            chosen = torch.as_tensor(o["member_rows"])
            if chosen.ndim != 2 or chosen.shape[0] != self.members:
                raise ValueError(
                    f"member_rows is (members, n) = ({self.members}, n) row numbers, got {tuple(chosen.shape)}"
                )
        elif o["bootstrap"]:
            chosen = torch.stack([rows[bootstrap_rows(len(rows), s)] for s in seeds])
        else:
            chosen = rows.unsqueeze(0)
        own = self.apart
        self.seen.append(fingerprints(take(x, chosen.unique())))
        self.data = Rows(x, y, chosen, o["batch_size"], seeds if own else seeds[:1], own)

    def _checked(self, x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
        """On the device, the targets as the likelihood needs them; one row is run to see what comes out."""
        # detached from what made them, like a network whose features they are
        x, y = map_inputs(lambda t: t.detach().to(self.device), x), y.detach().to(self.device)
        check_dtype(x, floating_dtype(self.posterior))
        return x, self.likelihood.check_targets(y, (len(y), *self._output_shape(take(x, torch.arange(1)))))

    @torch.no_grad()
    def _output_shape(self, one: Inputs) -> tuple[int, ...]:
        """Of p(y | x)'s parameters, a row, found by running one."""
        was = self.posterior.training
        self.posterior.eval()
        try:
            self.posterior.prepare(one)
            return tuple(call(self.model, select(self._draws(1), 0), one).shape[1:])
        except (RuntimeError, IndexError, AssertionError) as error:
            raise cannot_take(one, error) from error
        finally:
            self.posterior.train(was)

    def _draws(self, per_member: int) -> State:
        """(members * per_member, ...) entries of network and likelihood. Sample s belongs to member s % members."""
        return self.model.entries(torch.arange(self.members * per_member), self.o["seed"])

    def _training_batches(self) -> Iterator[tuple[Inputs, Tensor]]:
        """The rows trained on, as batches of one epoch."""
        for x, y in self.data.epoch(0):
            yield self._checked(x, y) if isinstance(self.data, Batches) else (x, y)

    # -- an epoch

    def _clip(self) -> None:
        most = self.o["clip_norm"]
        if most is None:
            return
        together = [p for name, p in self.trained.items() if name not in self.model.by_member]
        if together:
            torch.nn.utils.clip_grad_norm_(together, most)
        gradients = [p.grad for n, p in self.trained.items() if n in self.model.by_member and p.grad is not None]
        if not gradients:
            return
        square = sum(g.flatten(1).square().sum(1) if g.ndim > 1 else g.square() for g in gradients)
        scale = (most / (square.sqrt() + 1e-6)).clamp_max(1.0)  # type: ignore[union-attr]
        for g in gradients:
            g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))

    def _schedule(self):
        wanted = self.o["schedule"]
        if wanted is None:
            return None
        if wanted == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.o["epochs"])
        if not callable(wanted):
            raise ValueError(f"schedule is 'cosine' or a function of the optimizer, got {wanted!r}")
        schedule: Any = wanted(self.optimizer)
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau waits for a number that fit does not give a schedule: use schedule='cosine' or one "
                "of the epoch alone, like StepLR, and validation= with patience= to stop in time"
            )
        return schedule

    def _validate(self) -> Tensor:
        """(members,) mean -log p(y | x) of each member on the validation rows, nats."""
        assert self.validation is not None
        x, y = self.validation
        draws = 1 if self.posterior.n_draws is not None else _VALIDATION_DRAWS
        self.posterior.eval()
        total = torch.zeros(self.members)
        with torch.no_grad():
            state = self._draws(draws)
            shared = self.model.shared(state)
            for start in range(0, len(y), 1024):
                rows = torch.arange(start, min(start + 1024, len(y)))
                if self._evaluate is None:
                    some = take(x, rows[:_ROWS_COMPARED])
                    self._evaluate = call_each if why_not_mapped(self.model, state, shared, some) else call_stacked
                parameters = self._evaluate(self.model, state, shared, take(x, rows))
                each = torch.stack([-self.likelihood.nll(p, y[rows]) for p in parameters])
                each = torch.logsumexp(each.view(draws, self.members, -1), dim=0) - math.log(draws)
                total -= each.sum(1).cpu()
        self.posterior.train()
        return total / len(y)

    def _set_kl(self, epoch: int) -> None:
        warm = self.o["kl_warmup"]
        if self.kl_weight is not None and warm:
            self.posterior.kl_weight = self.kl_weight * min(1.0, epoch / warm)

    def run(self) -> History:
        begun = time.perf_counter()
        o, history = self.o, self.history
        self._resume()
        self.posterior.train()
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has turned off
                self._epochs()
        finally:  # a training that was interrupted has trained all the same
            self._leave()
        if o["checkpoint"] is not None:
            self._save(history.epochs)
        self.best.restore(state_of(self.losses))
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            self.posterior.after_training(self.model, self._training_batches())
        history.best_epoch = self.best.epoch.tolist()
        history.compile_seconds += self.step.compile_seconds
        history.seconds += time.perf_counter() - begun
        return history

    def _epochs(self) -> None:
        o, history = self.o, self.history
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), Progress("training", o["epochs"], o["progress"]) as bar:
            bar.done = self.start
            for epoch in range(self.start, o["epochs"]):
                torch.manual_seed((o["seed"] * 1_000_003 + epoch) % 2**63)  # for modules with noise of their own
                self._set_kl(epoch)
                self._epoch(epoch)
                self.posterior.after_epoch(epoch)
                note = f"loss {sum(history.train_loss[-1]) / self.members:.4g}"
                if self.validation is not None:
                    nll = self._validate()
                    history.validation_nll.append(nll.tolist())
                    self.best.update(epoch, nll, state_of(self.losses))
                    bar.total = self.best.last(o["epochs"])  # when it stops if nothing is gained any more
                    history.best_epoch = self.best.epoch.tolist()
                    note += f", validation {float(nll.mean()):.4g}"
                if self.schedule is not None:
                    self.schedule.step()
                history.epochs = epoch + 1
                bar.advance(note)
                if o["checkpoint"] is not None and (epoch + 1) % o["checkpoint_every"] == 0:
                    self._save(epoch + 1)
                if self.best.done:
                    break

    def _leave(self) -> None:
        """The posterior as it is used after training, which knows its rows."""
        if self.kl_weight is not None and self.o["kl_warmup"]:
            self.posterior.kl_weight = self.kl_weight
        self.posterior.eval()
        forget(self.posterior.module)
        forget(self.likelihood)
        # what vbdl.calibrate refuses to calibrate on; a plain attribute, no buffer that the network would carry
        before = self.posterior.training_rows
        seen = [*self.seen, *([] if before is None else [before])]
        if seen:
            self.posterior.training_rows = torch.cat(seen).unique()
        for p in self.trained.values():
            p.grad = None

    def _epoch(self, epoch: int) -> None:
        total = torch.zeros(self.members, device=self.device)
        rows = 0
        for x, y in self.data.epoch(epoch):
            if isinstance(self.data, Batches):
                x, y = self._checked(x, y)
                if epoch == self.start:
                    self.seen.append(fingerprints(x))
            self.optimizer.zero_grad()
            if not self._begun:
                self.posterior.before_training(x, y, self.likelihood, self.data.own)
                self._begun = True
            losses = self.step(x, y)
            self._clip()
            self.optimizer.step()
            n = y.shape[1] if self.data.own else y.shape[0]
            total += losses * n
            rows += n
        means = (total / max(rows, 1)).tolist()
        bad = [m for m, value in enumerate(means) if not math.isfinite(value)]
        if bad:
            lr = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss of member {bad[0]} became {means[bad[0]]} in epoch {epoch} (learning rate {lr:g}): "
                f"standardise inputs and targets, lower lr, or set clip_norm"
            )
        self.history.train_loss.append(means)

    # -- stopping and going on

    def _save(self, epoch: int) -> None:
        found = {f"model.{n}": t for n, t in state_of(self.losses).items()} | self.best.tensors()
        if self.seen:
            found["rows"] = torch.cat(self.seen).unique()
        save_checkpoint(self.o["checkpoint"], found, self.optimizer, self.schedule, self.history, epoch)

    def _resume(self) -> None:
        path = self.o["checkpoint"]
        if path is None or not Path(path).exists():
            return
        found, epoch, history = load_checkpoint(path, self.optimizer, self.schedule)
        if (rows := found.pop("rows", None)) is not None:  # a run that is finished looks at no row again
            self.seen.append(rows)
        own = state_of(self.losses)
        saved = {n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.")}
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(f"the checkpoint {path} is of another model: remove it, or give another path")
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(saved[name])
        self.best.load(found, self.device)
        for name, value in history.items():
            setattr(self.history, name, value)
        self.start = self.o["epochs"] if self.best.done else epoch


def _checked_optimizer(made: Any) -> torch.optim.Optimizer:
    """What the caller's function has made, if fit can step it."""
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer returns a torch.optim.Optimizer, got {type(made).__name__} from it")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step, which fit does not: use an optimizer with one gradient a "
            "step, like AdamW or SGD"
        )
    return made
