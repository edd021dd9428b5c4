"""SWAG: a normal distribution with the moments of the weights that training passes through.

Maddox, Garipov, Izmailov, Vetrov and Wilson, A Simple Baseline for Bayesian Uncertainty in Deep Learning, NeurIPS 2019,
https://arxiv.org/abs/1902.02476. An ensemble of it is MultiSWAG: Wilson and Izmailov, Bayesian Deep Learning and a
Probabilistic Perspective of Generalization, NeurIPS 2020, https://arxiv.org/abs/2002.08791.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vbdl_kernels import make_key

from vbdl.calling.copies import copied
from vbdl.nn.collected import CollectedNetwork
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.types import Course, Inputs, Likelihood, Output, State, TrainingRows

_LOWEST = 0.01  # the lowest rate of a cycle, as a fraction of its highest (Izmailov et al. 2018, section 3.2)


class SWAG(KeyedPosterior):
    """A SWAG posterior: q(w) = N(mean, diag(std^2) / 2 + D D^T / (2 (rank - 1))) of the weights in training.

        q = vbdl.SWAG(trained_network)
        vbdl.fit(q, data, likelihood, epochs=40, lr=1e-3)  # goes on training, and collects after each epoch

    Once an epoch `fit` adds the weights to their mean and variance std^2, and keeps their deviation from the mean so
    far as a column of D, the last `rank` of them. Variances that rounding leaves below 0 become 0. A further `fit`
    starts at the mean and collects on. Predictions before `fit` has collected raise ValueError.

    Running statistics of batch normalization belong to a draw. A network that has them gets `n_draws` draws, and `fit`
    ends with one pass over the training rows that computes the statistics of all; without them draws are unlimited.

    `DeepEnsemble(SWAG(network, collect_from=0.75), n)` is MultiSWAG: n trainings in one, of new initializations.

    module: the network. It is copied. Frozen parameters stay fixed.
    rank: the number of columns of D, at least 2.
    collect_from: epochs of `fit` to train before weights are collected: 0 for a trained network, a number of epochs, or
        a share of them between 0 and 1 (0.75). Before it, `fit(validation=...)` keeps the best epoch and `patience`
        stops early, and collecting starts there; from then on no epoch is the best one, and validation only records.
    swa_lr: the learning rate while weights are collected, by default `fit(lr=...)`; it decides how far they spread.
        Before, the rate is `lr` in the first half of the epochs, and falls linearly until nine tenths of them.
    cycle: epochs of a cycle while weights are collected: the rate falls linearly to a hundredth of swa_lr in each, and
        weights are collected at its end. By default the rate is constant and weights are collected after each epoch.
    n_draws: the number of draws of a network with batch normalization.
    seed: of dropout masks in training, and of the draws of a network with batch normalization; in an ensemble of these,
        member m uses seed + m in training.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> q, likelihood = vbdl.SWAG(net), vbdl.Categorical()
    >>> history = vbdl.fit(q, (x, y), likelihood, epochs=8, compile=False)
    >>> vbdl.Predictor(q, likelihood, compile=False)(x).epistemic.shape
    torch.Size([20])
    """

    module: CollectedNetwork

    def __init__(
        self,
        module: nn.Module,
        rank: int = 20,
        collect_from: int | float = 0,
        swa_lr: float | None = None,
        cycle: int | None = None,
        n_draws: int = 30,
        seed: int = 0,
        *,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        if collect_from < 0 or (isinstance(collect_from, float) and collect_from >= 1):
            raise ValueError(
                f"collect_from must be a number of epochs, like 30, or a share of them between 0 and 1, like 0.75; got "
                f"{collect_from!r}"
            )
        if swa_lr is not None and not swa_lr > 0:
            raise ValueError(f"swa_lr must be a positive learning rate, got {swa_lr}")
        if cycle is not None and cycle < 1:
            raise ValueError(f"cycle must be a number of epochs, at least 1, got {cycle}")
        if n_draws < 1:
            raise ValueError(f"n_draws must be at least 1, got {n_draws}")
        self.module = CollectedNetwork(copied(module), rank, n_draws)
        self.rank, self.collect_from, self.swa_lr, self.cycle = rank, collect_from, swa_lr, cycle
        self._draws = n_draws
        self.n_draws = self._final_draws
        self.seed = seed
        self._start = 0  # the first epoch of the cycle at whose end weights are first collected
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.module.key.device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        arguments: dict[str, Any] = {
            "rank": self.rank,
            "collect_from": self.collect_from,
            "swa_lr": self.swa_lr,
            "cycle": self.cycle,
            "n_draws": self._draws,
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}

    @property
    def _final_draws(self) -> int | None:
        """The number of draws after training."""
        return self._draws if self.module.statistics else None

    # -- prediction

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The key of each draw, {"key": (samples, 2)}; of draws with statistics of their own it ignores the seed."""
        return {"key": make_key(self.seed if self.module.statistics else seed, numbers)}

    def check_ready(self) -> None:
        """Raise ValueError before the weights of a whole training are collected."""
        if not int(self.module.finished):
            done = "was interrupted" if int(self.module.collected) else "has not collected any weights"
            raise ValueError(
                f"this SWAG {done}: train with vbdl.fit(q, data, likelihood, epochs=...) first, which collects them "
                f"after each epoch"
            )

    # -- training

    def course(self, epochs: int, lr: float) -> Course:
        cycle = self.cycle or 1
        start = self.collect_from
        if isinstance(start, float):  # leaves two weights to collect, if there can be two
            start = max(0, min(round(start * epochs), epochs - 2 * cycle))
        if epochs < start + 2 * cycle:
            raise ValueError(
                f"SWAG needs the weights of at least two epochs, and epochs={epochs} with collect_from="
                f"{self.collect_from} and cycle={self.cycle} collects {max(0, (epochs - start) // cycle)}: train for "
                f"at least {start + 2 * cycle} epochs"
            )
        self._start = start
        if self.swa_lr is None and self.cycle is None:
            return Course(collects_from=start)
        low = 1.0 if self.swa_lr is None else self.swa_lr / lr

        def rate(done: float) -> float:
            if done < start:
                falling = min(1.0, max(0.0, (done / start - 0.5) / 0.4))
                return 1.0 + (low - 1.0) * falling
            if self.cycle is None:
                return low
            share = (done - start) % self.cycle / self.cycle
            return low * (1.0 - (1.0 - _LOWEST) * share)

        return Course(rate, start)

    def being_trained(self, on: bool) -> None:
        self.module.being_trained = on
        self.n_draws = 1 if on else self._final_draws  # in training, it is the network in training

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        self.module.begin()

    def after_epoch(self, epoch: int) -> None:
        """Collect the weights, if a cycle ends with this epoch."""
        done = epoch + 1 - self._start
        if done > 0 and done % (self.cycle or 1) == 0:
            self.module.collect()

    def after_training(self, model: nn.Module, data: TrainingRows) -> None:
        """Make the moments the posterior, and compute the batch statistics of its draws."""
        self.module.finish()
        if self.module.statistics:
            self.module.measure(make_key(self.seed, range(self._draws)), data)
