"""The same graph for ONNX Runtime."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vbdl.export.graph import TileCall


def write(call: TileCall, arguments: tuple[Tensor, ...], path: Path) -> None:
    """One file with the weights inside. ModuleNotFoundError without the extra `onnx`."""
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the ONNX export needs the extra `onnx`: pip install 'vbdl[onnx]'") from error
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["seed", *(f"x{i}" for i in range(len(arguments) - 1))]
        torch.onnx.export(
            call.module,
            arguments,
            str(path),
            dynamo=True,
            external_data=False,
            input_names=names,
            output_names=list(call.fields),
            verbose=False,
        )


def runner(path: Path) -> Any:
    """A call of one tile in ONNX Runtime, with as many threads as torch has."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX packages need the extra `onnx`: pip install 'vbdl[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(*arguments: Tensor) -> list[Tensor]:
        given: dict[str, np.ndarray] = {}
        taken = iter(arguments) if len(names) == len(arguments) else iter(arguments[1:])
        for name in names:
            given[name] = next(taken).numpy()
        return [torch.from_numpy(np.asarray(v)) for v in session.run(None, given)]

    return call
