"""The same graph for ONNX Runtime."""

import logging
import warnings
from collections.abc import Sequence
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
            output_names=[f"{_OUTPUT}{name}" for name in call.fields],
            verbose=False,
        )
    _name_outputs(path, call.fields)


_OUTPUT = "vbdl_output_"  # a field is called as some value inside may be, `mean` for instance


def _name_outputs(path: Path, fields: Sequence[str]) -> None:
    """The graph's outputs called as the fields are, and no value inside it."""
    import onnx

    model = onnx.load(path)
    named = {name: f"{name}_inside" for name in fields} | {f"{_OUTPUT}{name}": name for name in fields}

    def rename(graph: Any) -> None:
        for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            value.name = named.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [named.get(name, name) for name in node.input]
            node.output[:] = [named.get(name, name) for name in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g)

    rename(model.graph)
    onnx.save(model, path)


def runner(path: Path, rows: int, shapes: Sequence[Sequence[int]]) -> Any:
    """A call of one tile in ONNX Runtime, with as many threads as torch has.

    rows, shapes: of the tile and of a row of each tensor. ValueError where the graph takes others.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX packages need the extra `onnx`: pip install 'vbdl[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for given in session.get_inputs():
        if given.name != "seed":
            place = int(given.name.removeprefix("x"))
            if place >= len(shapes) or list(given.shape) != [rows, *shapes[place]]:
                raise ValueError(f"{path.name} takes {given.name} of shape {given.shape}")

    def call(*arguments: Tensor) -> list[Tensor]:
        given: dict[str, np.ndarray] = {}
        taken = iter(arguments) if len(names) == len(arguments) else iter(arguments[1:])
        for name in names:
            given[name] = next(taken).numpy()
        return [torch.from_numpy(np.asarray(v)) for v in session.run(None, given)]

    return call
