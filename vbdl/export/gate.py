"""The gate compares an exported prediction with the predictor's before the export is written.

Exporters silently drop operations: ONNX Runtime, for instance, switches off dropout that is active in prediction
(onnxruntime#5549), and the results look plausible. The gate refuses an export whose results differ from the
predictor's, that has no epistemic spread, or that ignores its seed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vbdl.engine.predictor import Predictor
from vbdl.types import Inputs, State

TOLERANCE = 1e-5
_SEEDS = 16  # number of seeds tried to find one that changes the draws
_CENTER = ("probs", "mean")  # the fields that the uncertainties follow from
_SPREAD = 0.01  # tolerated relative difference of the mean epistemic uncertainty


class ExportError(ValueError):
    """Raised if an exported prediction differs from the predictor's or a package cannot be loaded; says why."""


@contextlib.contextmanager
def exporting(backend: str) -> Iterator[None]:
    """Turn errors of an exporter or its runtime into an ExportError that says what to do.

    ExportError, OSError and ImportError pass unchanged.
    """
    try:
        yield
    except (ExportError, OSError, ImportError):
        raise
    except Exception as error:  # exporters raise errors of any type
        raise ExportError(_in_words(str(error) or type(error).__name__, backend)) from error


def _in_words(message: str, backend: str) -> str:
    other = 'backend="aoti"' if backend == "onnx" else 'backend="onnx"'
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", message)
    if missing is not None:
        name = missing.group(1).rpartition(".")[2]
        return f"ONNX has no operation for {name}, which this predictor uses: export with {other}, or use another layer"
    missing = re.search(r"Could not find an implementation for (\w+)", message)
    if missing is not None:
        return (
            f"ONNX Runtime has no {missing.group(1)} in a precision that this predictor uses (decisions that read the "
            f"whole distribution compute in float64): export with {other}"
        )
    first = next((line for line in re.sub(r"\x1b\[\d*m", "", message).splitlines() if line.strip()), message)
    what = "ONNX" if backend == "onnx" else "AOTInductor"
    return f"{what} cannot export this predictor: {first.strip()[:300]}. Export with {other}, or use other layers"


def check(predictor: Predictor, exported: Callable[[Inputs, int], State], probe: Inputs) -> dict[str, float]:
    """Raise ExportError unless the exported fields equal the predictor's; return the largest difference of each field.

    exported: (rows, seed) -> fields by name. probe: the rows to compare on, similar to real ones.
    Tolerance: 1e-5 in probabilities and nats for classifiers; for regressions, whose fields have the units of the
    target, 1e-5 of the largest value. The result also has "rows", their number.
    """
    reference = predictor.replace(compile=False)
    measured = {"rows": 0.0}
    exported_fields: list[State] = []
    for seed, wanted in _expected(reference, probe):
        fields = exported(probe, seed)
        exported_fields.append(fields)
        if fields.keys() != wanted.keys():
            raise ExportError(
                f"the export and the predictor have different fields: {sorted(fields.keys() ^ wanted.keys())} are only "
                f"in one of them"
            )
        if predictor.n_samples > 1:  # a single draw has no spread; its values are compared below
            _spread(fields["epistemic"], wanted["epistemic"])
        for name in sorted(wanted, key=lambda n: n not in _CENTER):  # what differs first is reported
            difference = _difference(name, fields[name], wanted[name], wanted)
            measured[name] = max(measured.get(name, 0.0), difference)
        measured["rows"] = float(wanted["total"].shape[0])
    if len(exported_fields) > 1 and all(
        torch.equal(exported_fields[0][n], exported_fields[1][n]) for n in exported_fields[0]
    ):
        raise ExportError("another seed gives bit-identical results: the exporter turned the draws into constants")
    return measured


def _expected(reference: Predictor, probe: Inputs) -> list[tuple[int, State]]:
    """[(seed, fields)] of the predictor: for its own seed and for the first other one that changes the fields.

    Several seeds are tried, because few draws of few masks may coincide. Posteriors with a fixed number of draws
    ignore the seed and have one entry.
    """

    def fields(seed: int) -> State:
        predicted = vars(reference.replace(seed=seed)(probe))
        return {n: t for n, t in predicted.items() if isinstance(t, Tensor)}

    usual = fields(reference.seed)
    if reference.posterior.n_draws is not None:
        return [(reference.seed, usual)]
    step = 1 if reference.seed < 2**62 else -1
    for distance in range(1, _SEEDS + 1):
        changed = fields(reference.seed + step * distance)
        if any(_apart(usual[n], changed[n]) for n in ("epistemic", *_CENTER) if n in usual):
            return [(reference.seed, usual), (reference.seed + step * distance, changed)]
    return [(reference.seed, usual)]


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two fields differ by more than the tolerance of the gate."""
    return float((a - b).abs().max()) > TOLERANCE * max(float(a.abs().max()), torch.finfo(torch.float32).tiny)


def _spread(exported: Tensor, expected: Tensor) -> None:
    mean, expected_mean = float(exported.double().mean()), float(expected.double().mean())
    if not expected_mean > 0:
        raise ExportError(
            "the predictor has no epistemic uncertainty on the rows the export was checked on, so the export's cannot "
            "be compared: pass rows like the real ones as example="
        )
    if not abs(mean - expected_mean) <= _SPREAD * expected_mean:
        raise ExportError(
            f"the epistemic spread is {'gone' if mean < 0.01 * expected_mean else 'different'}: mean {mean:.3g}, and "
            f"{expected_mean:.3g} of the predictor. The exporter switched off or froze the randomness"
        )


def _difference(name: str, exported: Tensor, expected: Tensor, fields: State) -> float:
    """The largest difference of a field, relative to its scale; ExportError if it exceeds the tolerance."""
    if exported.shape != expected.shape or exported.dtype != expected.dtype:
        raise ExportError(
            f"{name} is {exported.dtype} {tuple(exported.shape)} in the export and {expected.dtype} "
            f"{tuple(expected.shape)} in the predictor"
        )
    if not expected.is_floating_point():
        wrong = int((exported != expected).sum())
        if wrong:
            raise ExportError(f"{wrong} of {expected.numel()} values of {name} differ from the predictor's")
        return 0.0
    # the parts of the uncertainty are compared on the scale of the total
    against = fields["total"] if name in ("total", "aleatoric", "epistemic", "covariance") else expected
    scale = float(against.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if against.numel() else 1.0
    scale = max(scale, 1.0) if "probs" in fields else max(scale, torch.finfo(torch.float32).tiny)
    same_kind = (exported.isnan() == expected.isnan()) & (exported.isinf() == expected.isinf())
    finite = expected.isfinite()
    apart = (exported - expected).abs()[finite & same_kind]
    worst = float(apart.max()) / scale if apart.numel() else 0.0
    if not bool(same_kind.all()) or not worst <= TOLERANCE:
        raise ExportError(
            f"{name} differs from the predictor's by {worst:.2g} of its scale {scale:.3g}; allowed is {TOLERANCE:g}"
        )
    return worst
