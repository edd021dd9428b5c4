"""The Laplace approximation: a normal distribution around the weights of a trained network, by one pass over the data.

MacKay, A Practical Bayesian Framework for Backpropagation Networks, Neural Computation 4, 1992; Ritter, Botev and
Barber, A Scalable Laplace Approximation for Neural Networks, ICLR 2018; Daxberger et al., Laplace Redux, NeurIPS 2021,
https://arxiv.org/abs/2106.14806
"""

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.copies import copied
from vbdl.calling.each import call_each
from vbdl.calling.mapping import can_map
from vbdl.calling.outputs import leaves, pick
from vbdl.calling.stacking import call, call_stacked, is_of_a_trace
from vbdl.curvature.blocks import BiasBlock, Block, DenseBlock, DiagonalBlock, KroneckerBlock
from vbdl.curvature.choosing import STRUCTURES, Group, check_last, chosen_names, curvature_is_known, grouped
from vbdl.curvature.evidence import LARGEST, Part, best_noise, best_precisions, best_with_noise, log_evidence
from vbdl.curvature.gauss_newton import Fit, GaussNewton
from vbdl.data.rows import take
from vbdl.model import Model
from vbdl.nn.gaussian import CannotLinearize, Dense, Diagonal, Factor, GaussianNetwork, Kronecker
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.types import Inputs, Likelihood, Output, State, TrainingRows

logger = logging.getLogger("vbdl")

_GRID = torch.logspace(-4, 5, 37, dtype=torch.float64).tolist()  # prior precisions compared on validation rows
_ROUNDING, _BEND = 1e-5, 1e-3  # of outputs that are linear, relative to the largest, and to the largest difference
_DRAWS, _ROWS = 32, 256  # draws for each of them, and rows at once


class LaplaceNetwork(GaussianNetwork):
    """The network of a Laplace approximation: it draws around its trained weights; in training it does not draw.

    rows: () int64, the number of rows of the pass over the data; 0 before it, when the prior precisions are so large
        that every draw is the trained network.
    log_likelihood: () the log-likelihood of these rows at the trained weights, in nats.
    map_precision: the prior precision that training adds as a penalty, or None; n_data: rows that it is divided by.
    """

    rows: Tensor
    log_likelihood: Tensor
    is_linear: bool = False  # whether it draws weights, because it cannot be and need not be linearized
    found_by_running = (*GaussianNetwork.found_by_running, "is_linear")

    def __init__(
        self,
        inner: nn.Module,
        factors: Sequence[Factor],
        linearized: bool,
        map_precision: float | None,
        n_data: int | None,
    ):
        super().__init__(inner, factors, linearized)
        self.map_precision, self.n_data = map_precision, n_data
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64, device=self.key.device))
        self.register_buffer("log_likelihood", torch.zeros((), dtype=torch.float64, device=self.key.device))

    def forward(self, *args, **kwargs):
        if self.training:
            return call(self.inner, {}, kwargs if kwargs else args)
        inputs = kwargs if kwargs else args
        if self.is_linear:
            return call(self.inner, self.weights(), inputs)
        try:
            return super().forward(*args, **kwargs)
        except Exception as error:  # torch has many where an operation has no forward mode
            if not self.linearized or is_of_a_trace(self.key) or isinstance(error, torch.OutOfMemoryError):
                raise
            mean = call(self.inner, {}, inputs)  # raises the network's own error, if that was one
            self.is_linear = self._is_linear(inputs, mean)
            if self.is_linear:
                return call(self.inner, self.weights(), inputs)
            raise CannotLinearize(
                f"the network cannot be linearized, because torch has no forward-mode derivative of one of its "
                f"operations ({str(error).splitlines()[0]}): use Laplace(net, linearized=False)"
            ) from error

    @torch.no_grad()
    def _is_linear(self, inputs: Inputs, mean: Any) -> bool:
        """Whether outputs are linear in the chosen parameters, as in those of a last layer; mean: those at the mean.

        Then outputs at drawn weights are those of the linearized network. The draws of a posterior may be too near to
        the mean to show that they are not, so far larger changes are made, which a function after the layer bends.
        """
        waves = lambda w: torch.arange(w.numel(), dtype=w.dtype, device=w.device).mul(1.7).cos().view(w.shape)
        deviations = {n: (0.1 + w.abs().mean()) * waves(w) for n in self.chosen for w in (self.mean(n),)}
        for scale in (1.0, 100.0):
            states = ({n: self.mean(n) + s * d for n, d in deviations.items()} for s in (scale, -scale))
            up, down = (call(self.inner, state, inputs) for state in states)
            for at, above, below in zip(*(leaves(o).values() for o in (mean, up, down)), strict=True):
                if isinstance(at, Tensor) and at.is_floating_point():
                    bend, slope = (above + below - 2 * at).abs(), (above - below).abs()
                    if bool((bend > _ROUNDING * at.abs().amax() + _BEND * slope.amax()).any()):
                        return False
        return True

    def regularization(self, key: Tensor) -> Tensor | None:
        """The prior's part of the loss of a row, precision * |w|^2 / (2 n_data), in nats."""
        if self.map_precision is None:
            return None
        if self.n_data is None:
            raise ValueError(
                "training with a prior needs the number of training rows, by which it is divided: give "
                "Laplace(net, n_data=len(rows)); a trained network needs no training: vbdl.fit(..., epochs=0)"
            )
        squares = torch.stack([self.mean(name).square().sum() for name in self.chosen])
        return 0.5 * self.map_precision * squares.sum() / self.n_data


class Laplace(KeyedPosterior):
    """A Laplace posterior: q(w) = N(trained weights, (H + prior precision)^-1), H the curvature of the training loss.

        q, likelihood = vbdl.Laplace(network), vbdl.Categorical()
        vbdl.fit(q, train, likelihood, epochs=0)  # one pass over the data; the network stays as it is
        predict = vbdl.Predictor(q, likelihood)

    H is the generalized Gauss-Newton matrix, the sum over rows of J^T (Hessian of -log p(y | outputs)) J with J the
    Jacobian of the outputs; batch normalization is in evaluation mode. Frozen parameters (requires_grad=False) stay
    fixed. Predictions before the pass raise ValueError.

    module: the trained network. It is copied.
    n_data: number of rows in the training set; needed only by fit(epochs=...) with a number as prior_precision.
    parameters: "last", the weight and bias of the last linear layer; "all" that are trainable: of a network with
        adapters, the adapters (Yang et al. 2024, arXiv:2308.13111); or a list of names of modules or parameters, of
        patterns such as "*.lora_A.*", or of module types.
    structure: of H. "kronecker", a product of two matrices for each linear layer and convolution (other parameters are
        independent); "diagonal"; "full", one matrix of all chosen parameters, for a few thousand of them.
    linearized: predict with the network linear in the chosen parameters, f(x; w*) + J(x) (w - w*), for which H is exact
        (Immer et al. 2021). False draws weights of the network as it is. A last layer is the same either way.
    prior_precision: 1 / variance of the normal prior around 0 of the chosen parameters: a number; "evidence", where the
        evidence of the training rows is largest; or "validation", where the likelihood of held-out rows is, which
        `fit(validation=...)` names. A Gaussian likelihood with learned noise gets the noise with the largest evidence.
    per_layer: choose a prior precision for each layer, by the evidence.
    joint_bias: whether "kronecker" treats a layer's bias as the weight of an input 1. False makes it independent of the
        weights, with a matrix of its own, as laplace-torch does.
    fisher_samples: backward passes for each batch, where H is not that of the last layer alone. By default one for each
        of at most 100 outputs, which is exact; for more outputs 32, a Monte Carlo estimate from counters.
    seed: of that estimate, and of dropout if `fit` trains first.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    `fit` with epochs > 0 trains the network first, without draws: a number as prior_precision adds its penalty
    precision * |w|^2 / 2 to the loss; otherwise `fit(weight_decay=...)` is the only one.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> q, likelihood = vbdl.Laplace(net), vbdl.Categorical()  # net is trained already
    >>> history = vbdl.fit(q, (x, y), likelihood, epochs=0, compile=False)  # one pass
    >>> vbdl.Predictor(q, likelihood, compile=False)(x).epistemic.shape
    torch.Size([20])
    """

    module: LaplaceNetwork
    fits_trained = True

    def __init__(
        self,
        module: nn.Module,
        n_data: int | None = None,
        parameters: str | Sequence[str | type[nn.Module]] = "last",
        structure: str = "kronecker",
        linearized: bool = True,
        prior_precision: str | float = "evidence",
        per_layer: bool = False,
        joint_bias: bool = True,
        fisher_samples: int | None = None,
        seed: int = 0,
        *,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        if structure not in STRUCTURES:
            raise ValueError(f"structure must be one of {', '.join(map(repr, STRUCTURES))}, got {structure!r}")
        if isinstance(parameters, str) and parameters not in ("last", "all"):
            raise ValueError(
                f"parameters must be 'last', 'all' or a list of names, got {parameters!r}: write [{parameters!r}]"
            )
        if n_data is not None and n_data < 1:
            raise ValueError(f"n_data must be the number of training rows, at least 1, got {n_data}")
        if fisher_samples is not None and fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        if prior_precision not in ("evidence", "validation"):
            prior_precision = _checked(prior_precision)
        if per_layer and (structure == "full" or prior_precision == "validation"):
            raise ValueError(
                "per_layer is chosen by the evidence of structure='kronecker' or 'diagonal': one matrix of all "
                "parameters, and validation rows, choose one prior precision"
            )
        names = chosen_names(module, parameters)
        factors = [_factor(group) for group in grouped(module, names, structure, joint_bias)]
        self.structure, self.prior, self.per_layer = structure, prior_precision, per_layer
        self.parameters_chosen = parameters if isinstance(parameters, str) else "some"
        self.joint_bias, self.fisher_samples = joint_bias, fisher_samples
        self.seed = seed
        number = prior_precision if isinstance(prior_precision, float) else None
        self.module = LaplaceNetwork(copied(module), factors, linearized, number, n_data)
        for factor in factors:
            _precision(factor).fill_(LARGEST)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.module.key.device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        m = self.module
        arguments: dict[str, Any] = {
            "n_data": m.n_data,
            "parameters": [n for n, _ in m.inner.named_parameters() if n in m.chosen],
            "structure": self.structure,
            "linearized": m.linearized,
            "prior_precision": self.prior,
            "per_layer": self.per_layer,
            "joint_bias": self.joint_bias,
            "fisher_samples": self.fisher_samples,
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}

    # -- the pass over the data

    def check_ready(self) -> None:
        """Raise ValueError before the pass over the training rows."""
        if int(self.module.rows) == 0:
            raise ValueError(
                "this Laplace posterior has not seen the training rows yet: call vbdl.fit(q, (x, y), likelihood, "
                "epochs=0) first, one pass over the data that leaves the network as it is"
            )

    @torch.no_grad()
    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        """Forget an earlier pass, so that validation sees the network that is trained and not its draws."""
        self.module.rows.zero_()
        self._set({layer: LARGEST for layer in self._layers()})

    def prepare(self, inputs: Inputs) -> None:
        """Before the pass over the data, check that the layer taken for the last one is the last one."""
        if self.parameters_chosen == "last" and int(self.module.rows) == 0:
            was_training = self.module.training
            self.module.eval()
            try:
                check_last(self.module.inner, self.module.chosen, inputs, self.output)
            finally:
                self.module.train(was_training)

    def after_training(self, model: nn.Module, data: TrainingRows) -> None:
        """Sum the curvature over the training rows, and choose the prior precision and the noise."""
        assert isinstance(model, Model)
        likelihood = model.likelihood
        self._set_noise_of_outputs(likelihood, data)
        means = {name: self.module.mean(name).detach() for name in self.module.chosen}
        blocks = [_block(f, {n: means[n] for n in f.names}, self.structure) for f in self.module.factors]
        curvature = GaussNewton(self.module.inner, likelihood, blocks, self.output, self.fisher_samples, self.seed)
        for x, y in data:
            with curvature_is_known():
                curvature.add(x, y)
        with torch.no_grad():
            for factor, block in zip(self.module.factors, blocks, strict=True):
                for name, value in block.finish().items():
                    target = factor.curvature(name) if isinstance(factor, Diagonal) else factor.get_buffer(name)
                    target.copy_(value)
            self.module.rows.fill_(curvature.fit.rows)
            if self.prior == "validation":
                self._by_validation(model, curvature.fit, data.validation)
            else:
                self._choose(likelihood, curvature.fit)

    @torch.no_grad()
    def _set_noise_of_outputs(self, likelihood: Likelihood, data: TrainingRows) -> None:
        """Set the learned noise of several outputs to that of the residuals: the evidence scales all by one factor."""
        if likelihood.learned_noise < 2:
            return
        fit = Fit()
        for x, y in data:
            fit.add(likelihood, pick(call(self.module.inner, {}, x), self.output), y)
        assert fit.residuals is not None
        likelihood.scale_noise((fit.residuals / fit.elements).clamp_min(1e-20).sqrt())

    def _choose(self, likelihood: Likelihood, fit: Fit) -> None:
        """Set the prior precisions, and the noise, with the largest evidence, or those that were given."""
        parts = self._parts()
        scale = 1.0
        if fit.residuals is None:
            precisions = self._given(parts) or best_precisions(list(parts.values()))
        else:
            residuals, elements = float(fit.residuals.sum()), fit.elements * len(fit.residuals)
            if (precisions := self._given(parts)) is not None:
                scale = best_noise(list(parts.values()), precisions, residuals, elements)
            else:
                precisions, scale = best_with_noise(list(parts.values()), residuals, elements)
            self._scale_noise(likelihood, fit, scale)
        self._set(dict(zip(parts, precisions, strict=True)))
        if fit.residuals is None:
            self.module.log_likelihood.fill_(-fit.nll)

    def _given(self, parts: Mapping[str, Part]) -> list[float] | None:
        return [self.prior] * len(parts) if isinstance(self.prior, float) else None

    def _scale_noise(self, likelihood: Likelihood, fit: Fit, scale: float) -> None:
        """Multiply the noise std by this factor, and what follows from it: curvature and log-likelihood."""
        assert fit.residuals is not None
        residuals, elements = float(fit.residuals.sum()), fit.elements * len(fit.residuals)
        likelihood.scale_noise(torch.full((len(fit.residuals),), scale, dtype=torch.float64))
        for factor in self.module.factors:
            for values in _curvatures(factor):
                values.div_(scale**2)
        shift = elements * math.log(scale) + 0.5 * residuals * (scale**-2 - 1)
        self.module.log_likelihood.fill_(-(fit.nll + shift))

    def _by_validation(self, model: Model, fit: Fit, rows: tuple[Inputs, Tensor] | None) -> None:
        """Set the prior precision with the smallest negative log-likelihood of the held-out rows."""
        if rows is None:
            raise ValueError(
                "prior_precision='validation' needs held-out rows: give vbdl.fit(..., validation=0.1) or "
                "validation=(x, y), or choose prior_precision='evidence'"
            )
        if fit.residuals is not None:
            # the noise of the best evidence, so that precisions are compared with the same noise
            parts = list(self._parts(joined=True).values())
            residuals, elements = float(fit.residuals.sum()), fit.elements * len(fit.residuals)
            self._scale_noise(model.likelihood, fit, best_with_noise(parts, residuals, elements)[1])
        else:
            self.module.log_likelihood.fill_(-fit.nll)
        losses = []
        for precision in _GRID:
            self._set({"": precision})
            losses.append(self._validation_loss(model, *rows))
        self._set({"": _GRID[min(range(len(_GRID)), key=losses.__getitem__)]})

    def _validation_loss(self, model: Model, x: Inputs, y: Tensor) -> float:
        """The mean -log p(y | x) of the mixture of 32 draws, in nats."""
        entries = model.entries(torch.arange(_DRAWS), self.seed)
        shared, total = model.shared(entries), 0.0
        execute = call_stacked if can_map(model) else call_each
        for start in range(0, len(y), _ROWS):
            some = torch.arange(start, min(start + _ROWS, len(y)))
            parameters = execute(model, entries, shared, take(x, some))
            each = torch.stack([-model.likelihood.nll(p, y[some]) for p in parameters])
            total -= float((each.logsumexp(0) - math.log(_DRAWS)).sum())
        return total / len(y)

    # -- the evidence

    def _layers(self, joined: bool = False) -> dict[str, list[Factor]]:
        """The factors that share a prior precision, by the name of their layer, or all under ""."""
        layers: dict[str, list[Factor]] = {}
        for factor in self.module.factors:
            name = factor.names[0].rpartition(".")[0] if self.per_layer and not joined else ""
            layers.setdefault(name, []).append(factor)
        return layers

    def _parts(self, joined: bool = False) -> dict[str, Part]:
        """The eigenvalues of the curvature and |w|^2 of the weights that share a prior precision."""
        parts = {}
        for layer, factors in self._layers(joined).items():
            values = torch.cat([_eigenvalues(factor).double() for factor in factors])
            means = [f.without_padding(n, self.module.mean(n)).detach() for f in factors for n in f.names]
            parts[layer] = Part(values, sum(float(m.double().square().sum()) for m in means))
        return parts

    def _set(self, precisions: Mapping[str, float]) -> None:
        """Set the prior precisions, by the names of `_layers`, or one for all, under ""."""
        for layer, factors in self._layers().items():
            for factor in factors:
                _precision(factor).fill_(precisions[layer if layer in precisions else ""])

    @property
    def prior_precision(self) -> float | dict[str, float]:
        """The prior precision, or those of the layers by name with per_layer=True; set after `fit`.

        Setting it changes predictions, without another pass: a number, numbers by the layer's name, or "evidence" for
        the largest evidence at the present noise. A predictor made before does not change.
        """
        values = {layer: float(_precision(factors[0])) for layer, factors in self._layers().items()}
        return values if self.per_layer else values[""]

    @prior_precision.setter
    def prior_precision(self, value: str | float | Mapping[str, float]) -> None:
        self.check_ready()
        layers = self._layers()
        if value == "evidence":
            parts = self._parts()
            self._set(dict(zip(parts, best_precisions(list(parts.values())), strict=True)))
        elif isinstance(value, Mapping):
            if value.keys() != layers.keys() or not self.per_layer:
                wanted = f"one for each of {list(layers)}" if self.per_layer else "one number"
                raise ValueError(f"prior precisions are given for {list(value)}: give {wanted}")
            self._set({layer: _checked(v) for layer, v in value.items()})
        else:
            precision = _checked(value)
            self._set({layer: precision for layer in layers})

    def log_evidence(self) -> float:
        """The Laplace approximation of log p(training targets), in nats, at the present prior precision and noise.

        Raises ValueError before the pass over the data.
        """
        self.check_ready()
        precisions = [float(_precision(factors[0])) for factors in self._layers().values()]
        return log_evidence(float(self.module.log_likelihood), list(self._parts().values()), precisions)


def _checked(value: object) -> float:
    """A prior precision as a positive float. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (float(value) > 0 and math.isfinite(float(value))):
        raise ValueError(
            f"prior_precision must be 'evidence', 'validation' or a positive number, 1 / variance, got {value!r}"
        )
    return float(value)


def _factor(group: Group) -> Factor:
    if group.kind == "kronecker":
        return Kronecker(group.parameters)
    return (Dense if group.kind == "dense" else Diagonal)(group.parameters, group.padding)


def _block(factor: Factor, parameters: State, structure: str) -> Block:
    """The sums over rows from which this factor is filled in."""
    if isinstance(factor, Kronecker):
        return KroneckerBlock(parameters)
    if isinstance(factor, Dense):
        return BiasBlock(parameters) if structure == "kronecker" else DenseBlock(parameters, factor.padding)
    return DiagonalBlock(parameters)


def _precision(factor: Factor) -> Tensor:
    """The prior precision of a factor, (): its buffer."""
    return factor.get_buffer("prior_precision")


def _curvatures(factor: Factor) -> list[Tensor]:
    """The buffers of a factor that are proportional to the curvature."""
    if isinstance(factor, Kronecker):
        return [factor.output_values]
    if isinstance(factor, Dense):
        return [factor.values]
    assert isinstance(factor, Diagonal)
    return [factor.curvature(name) for name in factor.names]


def _eigenvalues(factor: Factor) -> Tensor:
    """The eigenvalues of a factor's curvature, (weights,), without padding rows."""
    if isinstance(factor, Kronecker):
        return (factor.output_values[:, None] * factor.input_values).flatten()
    if isinstance(factor, Dense):
        return factor.values
    assert isinstance(factor, Diagonal)
    return torch.cat([factor.without_padding(n, factor.curvature(n)).flatten() for n in factor.names])
