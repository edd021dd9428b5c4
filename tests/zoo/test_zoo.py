"""Networks of torchvision, timm, transformers, peft and torch_geometric, and hand-written ones, by every method.

    pip install -e '.[test,zoo]'; pytest -m slow tests/zoo
    python tests/zoo/test_zoo.py [NETWORK ...]         prints the table network x method: ok, or the reason

Each cell: three steps of `fit`, a prediction against a plain loop, and the same prediction after saving and loading.
"""

import importlib
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vbdl
from vbdl.calling.checks import unwrapped
from vbdl.calling.stacking import call, select

sys.path.insert(0, str(Path(__file__).parent))
import zoo_images  # noqa: E402
import zoo_own  # noqa: E402
import zoo_transformers  # noqa: E402
from zoo_case import ROWS, Case  # noqa: E402
from zoo_failures import FAILURES  # noqa: E402

pytestmark = pytest.mark.slow

CASES: dict[str, Case] = {**zoo_images.CASES, **zoo_transformers.CASES, **zoo_own.CASES}
CELLS = [(name, method) for name, case in CASES.items() for method in case.methods]
COMPILED = [
    ("torchvision resnet18", "ensemble"),
    ("FT-Transformer", "dropout"),
    ("LSTM", "dropout"),
    ("KAN", "mean-field"),
]
N_DRAWS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def declare_operators() -> None:
    """Declare torchvision's operators where its own library does not load beside this build of torch.

    None of them is used here: declaring those that it asks for when it is imported is enough.
    """
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)


LIBRARIES: list[torch.library.Library] = []  # they live as long as the process


def posterior(case: Case, method: str) -> Any:
    """The posterior of a case and method, before training."""

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return case.make()

    chosen = {} if case.output is None else {"output": case.output}
    if method == "ensemble":
        return vbdl.DeepEnsemble([network(0), network(1)], **chosen)
    if method == "fresh":
        return vbdl.DeepEnsemble(network(0), n_members=2, **chosen)
    if method == "mean-field":
        return vbdl.MeanField(network(0), n_data=ROWS, **chosen)
    return vbdl.MCDropout(network(0), **chosen) if method == "dropout" else vbdl.Stochastic(network(0))


def data(case: Case) -> tuple[Any, Tensor, Any]:
    """Inputs, targets and the likelihood of a case."""
    torch.manual_seed(2)
    x = case.inputs(ROWS)
    outputs = case.read(call(unwrapped(case.make()).eval(), {}, x)).detach()
    if case.likelihood == "numbers":
        return x, torch.randn_like(outputs), vbdl.Gaussian(outputs.shape[-1])
    return x, torch.randint(0, outputs.shape[-1], outputs.shape[:-1]), vbdl.Categorical()


def plain_loop(case: Case, q: Any, x: Any) -> Tensor:
    """The mean over the draws of the seed, each a call of its own; of an ensemble, of networks with loaded weights."""
    outputs = []
    if isinstance(q, vbdl.DeepEnsemble):
        for m in range(q.n_members):
            network = unwrapped(case.make()).eval()
            network.load_state_dict(q.member(m), strict=False)
            outputs.append(case.read(call(network, {}, x)))
    else:
        q.prepare(x)
        state = q.draws(torch.arange(N_DRAWS), 0)
        outputs += [case.read(call(q.module, select(state, s), x)) for s in range(N_DRAWS)]
    each = torch.stack(outputs).detach()
    return (each.softmax(-1) if case.likelihood == "classes" else each).mean(0)


def check(name: str, method: str, folder: Path, compile: bool = False) -> None:
    """Train, predict, compare, save and load a network; any error is the reason why the cell is not ok."""
    case = CASES[name]
    q, (x, y, likelihood) = posterior(case, method), data(case)
    vbdl.fit(q, (x, y), likelihood, epochs=3, batch_size=ROWS, lr=1e-4, compile=False, progress=False)
    n_samples = q.n_draws or N_DRAWS
    predict = vbdl.Predictor(q, likelihood, n_samples, tiles=ROWS, compile=compile, joint=True)
    p = predict(x)
    torch.testing.assert_close(p.mean, plain_loop(case, predict.posterior, x), **CLOSE)
    if method == "fresh":
        samples = predict(x, samples=True).samples  # the epistemic part of an untrained head may be below rounding
        assert not torch.equal(samples[0], samples[1]), "the members do not differ"
    predict.save(folder / "model.vbdl", example=x)
    networks = [case.make() for _ in predict.posterior.parts]
    loaded = vbdl.load(folder / "model.vbdl", module=networks, compile=False)
    torch.testing.assert_close(loaded(x).mean, p.mean, **(CLOSE if compile else {"rtol": 0, "atol": 0}))


@pytest.fixture(autouse=True)
def _quiet():
    declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, and not of what is tested
        yield


def _cells(cells: list[tuple[str, str]]) -> list[Any]:
    marks = {cell: pytest.mark.xfail(strict=True, reason=reason) for cell, reason in FAILURES.items()}
    return [pytest.param(*cell, marks=marks.get(cell, ())) for cell in cells]


@pytest.mark.parametrize(("name", "method"), _cells(CELLS))
def test_a_network_is_trained_predicted_saved_and_loaded(tmp_path, name, method):
    for package in CASES[name].needs:
        pytest.importorskip(package)
    check(name, method, tmp_path)


@pytest.mark.parametrize(("name", "method"), _cells(COMPILED))
def test_compiled_it_predicts_the_same(tmp_path, name, method):
    for package in CASES[name].needs:
        pytest.importorskip(package)
    check(name, method, tmp_path, compile=True)


def test_the_benchmarks_resnet_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    network, theirs = zoo_own.images.ResNet18().eval(), models.resnet18().eval()
    theirs.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(x), theirs(x), rtol=0, atol=0)


def main(names: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    declare_operators()
    methods = ("dropout", "mean-field", "ensemble", "fresh", "stochastic")
    print("| network | " + " | ".join(methods) + " |\n| --- |" + " --- |" * len(methods))
    reasons: dict[str, list[str]] = {}
    for name in names or CASES:
        row = []
        for method in methods:
            said = "-" if method not in CASES[name].methods else "ok"
            if said == "ok":
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        check(name, method, Path(folder))
                    except Exception as error:
                        last = traceback.extract_tb(error.__traceback__)[1].name
                        reason = f"{last}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                        reasons.setdefault(reason, []).append(f"{name} ({method})")
                        said = str(list(reasons).index(reason) + 1)
            row.append(said)
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)
    for number, (reason, cells) in enumerate(reasons.items(), 1):
        print(f"\n{number}. {', '.join(cells)}: {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
