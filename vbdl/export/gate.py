"""The gate: an exported prediction is compared with the predictor before anyone sees it.

Exports lose what they do not understand without a word: dropout that is on in prediction is switched off by ONNX
Runtime (onnxruntime#5549), and the numbers that come out look fine. What is refused here: other numbers, no epistemic
spread, a seed that does nothing.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vbdl.calling.stacking import Inputs, State
from vbdl.engine.predictor import Predictor

TOLERANCE = 1e-5
_SEEDS = 16  # that are tried for one with other draws
_SPREAD = 0.01  # share of the mean epistemic uncertainty that may differ


class ExportError(ValueError):
    """An exported prediction that is not the predictor's, or a package that does not fit; the message says how."""


_LAYERS = {"mkldnn_rnn_layer": "torch.nn.LSTM", "lstm": "torch.nn.LSTM", "gru": "torch.nn.GRU"}


@contextlib.contextmanager
def exporting(backend: str) -> Iterator[None]:
    """Whatever an exporter or its runtime raises, as an ExportError that says what to do; ours and the disk's as is."""
    try:
        yield
    except (ExportError, OSError, ImportError):
        raise
    except Exception as error:  # exporters fail in many ways
        raise ExportError(_in_words(str(error) or type(error).__name__, backend)) from error


def _in_words(said: str, backend: str) -> str:
    other = 'backend="aoti"' if backend == "onnx" else 'backend="onnx"'
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", said)
    if missing is not None:
        name = missing.group(1).rpartition(".")[2]
        layer = f"{_LAYERS[name]}, as {name}" if name in _LAYERS else name
        return (
            f"ONNX has no operation for {layer}, which this predictor computes with: export with {other}, or use "
            f"another layer"
        )
    missing = re.search(r"Could not find an implementation for (\w+)", said)
    if missing is not None:
        return (
            f"ONNX Runtime has no {missing.group(1)} in the precision that this predictor computes with (decisions "
            f"that read the whole distribution take float64): export with {other}"
        )
    first = next((line for line in re.sub(r"\x1b\[\d*m", "", said).splitlines() if line.strip()), said)
    what = "ONNX" if backend == "onnx" else "AOTInductor"
    return (
        f"{what} cannot take this predictor, and says: {first.strip()[:300]}. Export with {other}, or use other layers"
    )


def check(predictor: Predictor, exported: Callable[[Inputs, int], State], probe: Inputs) -> dict[str, float]:
    """Raises ExportError unless exported(rows, seed) -> fields are the predictor's; returns what was measured.

    probe: rows of which predictions are compared; ones that are like the real ones. Fields agree to 1e-5, of 1 for
    probabilities and nats, of the largest value for regressions, whose units are the target's.
    """
    reference = predictor.replace(compile=False)
    measured = {"rows": 0.0}
    found: list[State] = []
    for seed, wanted in _expected(reference, probe):
        fields = exported(probe, seed)
        found.append(fields)
        if fields.keys() != wanted.keys():
            raise ExportError(f"fields differ: {sorted(fields.keys() ^ wanted.keys())} are in one of the two only")
        if predictor.n_samples > 1:  # one draw has no spread, and its numbers are compared all the same
            _spread(fields["epistemic"], wanted["epistemic"])
        for name, value in wanted.items():
            difference = _difference(name, fields[name], value, wanted)
            measured[name] = max(measured.get(name, 0.0), difference)
        measured["rows"] = float(wanted["total"].shape[0])
    if len(found) > 1 and all(torch.equal(found[0][n], found[1][n]) for n in found[0]):
        raise ExportError("another seed gives the same numbers to the bit: the draws are constants of the export")
    return measured


def _expected(reference: Predictor, probe: Inputs) -> list[tuple[int, State]]:
    """The predictor's fields of its seed, and of another that changes them: few draws of few masks can be the same."""

    def fields(seed: int) -> State:
        predicted = vars(reference.replace(seed=seed)(probe))
        return {n: t for n, t in predicted.items() if isinstance(t, Tensor)}

    own = fields(reference.seed)
    if reference.posterior.n_draws is not None:
        return [(reference.seed, own)]
    step = 1 if reference.seed < 2**62 else -1
    for distance in range(1, _SEEDS + 1):
        other = fields(reference.seed + step * distance)
        if any(_apart(own[n], other[n]) for n in ("epistemic", "probs", "mean") if n in own):
            return [(reference.seed, own), (reference.seed + step * distance, other)]
    return [(reference.seed, own)]


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two fields differ by more than an export may."""
    return float((a - b).abs().max()) > TOLERANCE * max(float(a.abs().max()), torch.finfo(torch.float32).tiny)


def _spread(found: Tensor, expected: Tensor) -> None:
    own, reference = float(found.double().mean()), float(expected.double().mean())
    if not reference > 0:
        raise ExportError(
            "the predictor itself has no epistemic uncertainty on the rows the export was tried on, so nothing can be "
            "said about it: give rows like the real ones as example="
        )
    if not abs(own - reference) <= _SPREAD * reference:
        raise ExportError(
            f"the epistemic spread is {'gone' if own < 0.01 * reference else 'another'}: mean {own:.3g}, and "
            f"{reference:.3g} of the predictor. An exporter has switched off or frozen what is random"
        )


def _difference(name: str, found: Tensor, expected: Tensor, fields: State) -> float:
    """The largest difference, in units of what the tolerance is of; raises past the tolerance."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{name} is {found.dtype} {tuple(found.shape)}, and {expected.dtype} {tuple(expected.shape)} of the "
            f"predictor"
        )
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        if wrong:
            raise ExportError(f"{wrong} of {expected.numel()} values of {name} differ from the predictor's")
        return 0.0
    # the parts of the uncertainty are measured against the whole
    against = fields["total"] if name in ("total", "aleatoric", "epistemic", "covariance") else expected
    scale = float(against.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if against.numel() else 1.0
    scale = max(scale, 1.0) if "probs" in fields else max(scale, torch.finfo(torch.float32).tiny)
    same_kind = (found.isnan() == expected.isnan()) & (found.isinf() == expected.isinf())
    finite = expected.isfinite()
    apart = (found - expected).abs()[finite & same_kind]
    worst = float(apart.max()) / scale if apart.numel() else 0.0
    if not bool(same_kind.all()) or not worst <= TOLERANCE:
        raise ExportError(f"{name} differs from the predictor's by {worst:.2g} of {scale:.3g}, more than {TOLERANCE:g}")
    return worst
