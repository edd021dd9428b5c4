"""Methods for a trained network: as it is, a temperature, Laplace, SWAG, augmentation. All start from the same one."""

from collections.abc import Callable

from vbdl.augmentations import RandomShift
from vbdl.bench.methods.shared import Trained, trained_networks
from vbdl.bench.methods.training import recipe
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Task
from vbdl.calibration.calibrate import calibrate
from vbdl.calibration.std_scaling import StdScaling
from vbdl.calibration.temperature import Temperature
from vbdl.engine.predictor import Predictor
from vbdl.posteriors.augmentation import TestTimeAugmentation
from vbdl.posteriors.deterministic import Deterministic
from vbdl.posteriors.laplace import Laplace
from vbdl.posteriors.swag import SWAG
from vbdl.training.fit import fit
from vbdl.types import Likelihood, Posterior

_SAMPLES, _AUGMENTED = 100, 16
_SWAG_EPOCHS = 0.5  # of the epochs of the network


@method("deterministic")
def deterministic(task: Task, run: Run) -> Each:
    """the trained network as it is"""
    return _as_it_is(task, run)


def _as_it_is(task: Task, run: Run) -> Each:
    return _each(task, run, lambda split, trained: (Deterministic(trained.network), trained.likelihood))


@method("temperature")
def temperature(task: Task, run: Run) -> Each:
    """the trained network with a temperature (regression: a scaled noise) of held-out rows"""
    if not task.n_held:
        raise ValueError("temperature needs rows that training has not seen: give --hold-out 0.1")
    plain = _as_it_is(task, run).predictors
    calibrated = []
    for split, predictor in enumerate(plain):
        calibrator = StdScaling() if task.regression else Temperature()
        calibrated.append(calibrate(predictor, task.held(split), calibrator))
    return Each(calibrated)


@method("laplace")
def laplace(task: Task, run: Run) -> Each:
    """Laplace approximation of the last layer of the trained network, prior by the evidence"""
    return _each(task, run, _by_evidence(task, run, "last"))


@method("laplace-all")
def laplace_all(task: Task, run: Run) -> Each:
    """Laplace approximation of all layers of the trained network, linearized, prior by the evidence"""
    return _each(task, run, _by_evidence(task, run, "all"))


def _by_evidence(task: Task, run: Run, parameters: str) -> Callable[[int, Trained], tuple[Posterior, Likelihood]]:
    """The Laplace approximation of these parameters of a split's network, after its pass over the training rows."""

    def fitted(split: int, trained: Trained) -> tuple[Posterior, Likelihood]:
        q = Laplace(trained.network, parameters=parameters, seed=run.seed)
        fit(q, task.training(split), trained.likelihood, epochs=0, progress=run.progress)
        return q, trained.likelihood

    return fitted


@method("laplace-validation")
def laplace_validation(task: Task, run: Run) -> Each:
    """Laplace approximation of the last layer of the trained network, prior by held-out rows"""
    if not task.n_held:
        raise ValueError("laplace-validation needs rows that training has not seen: give --hold-out 0.1")

    def fitted(split: int, trained: Trained) -> tuple[Posterior, Likelihood]:
        q = Laplace(trained.network, prior_precision="validation", seed=run.seed)
        held = task.held(split)
        fit(q, task.training(split), trained.likelihood, epochs=0, validation=held, progress=run.progress)
        return q, trained.likelihood

    return _each(task, run, fitted)


@method("swag")
def swag(task: Task, run: Run) -> Each:
    """SWAG: the trained network is trained on for half of its epochs, at half of its rate"""
    own = recipe(task)
    epochs = max(2, run.epochs(own.get("epochs", 60) * _SWAG_EPOCHS))

    def fitted(split: int, trained: Trained) -> tuple[Posterior, Likelihood]:
        q = SWAG(trained.network, seed=run.seed + split)
        fit(
            q,
            task.training(split),
            trained.likelihood,
            epochs=epochs,
            batch_size=own.get("batch_size", 64),
            lr=own.get("lr", 3e-3) / 2,
            weight_decay=own.get("weight_decay", 0.0),
            seed=run.seed + split,
            compile=run.compile,
            progress=run.progress,
        )
        return q, trained.likelihood

    return _each(task, run, fitted)


@method("tta")
def augmentation(task: Task, run: Run) -> Each:
    """the trained network on images shifted by up to 2 pixels, 16 draws"""
    if task.x.ndim != 5:  # (splits, rows, channels, height, width)
        raise ValueError("tta shifts images, and these rows are none: choose another method")
    augmented = lambda split, trained: (
        TestTimeAugmentation(trained.network, RandomShift(2, "edge")),
        trained.likelihood,
    )
    return _each(task, run, augmented, _AUGMENTED)


def _each(
    task: Task, run: Run, fitted: Callable[[int, Trained], tuple[Posterior, Likelihood]], samples: int = _SAMPLES
) -> Each:
    """A predictor for each split, of what `fitted` makes of its trained network; samples: draws, if unlimited."""
    predictors = []
    for split, trained in enumerate(trained_networks(task, run)):
        q, likelihood = fitted(split, trained)
        draws = run.draws(samples) if q.n_draws is None else None
        predictors.append(Predictor(q, likelihood, draws, run.seed, compile=False, tiles=(256,)))
    return Each(predictors)
