"""Write the graph of a tile's prediction as an ONNX file, and run it in ONNX Runtime."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vbdl.export.graph import TileCall


def write(call: TileCall, arguments: tuple[Tensor, ...], path: Path) -> None:
    """Write the call as one ONNX file that includes the weights; ModuleNotFoundError without the extra `onnx`."""
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


_OUTPUT = "vbdl_output_"  # prefix during export: an inner value of the graph may have a field's name, like `mean`


def _name_outputs(path: Path, fields: Sequence[str]) -> None:
    """Rename the graph's outputs to the names of the fields, and inner values that have such a name to another."""
    import onnx

    model = onnx.load(path)
    named = {name: f"{name}_inside" for name in fields} | {f"{_OUTPUT}{name}": name for name in fields}

    def rename(graph: onnx.GraphProto) -> None:
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


def runner(path: Path, rows: int, shapes: Sequence[Sequence[int]]) -> Callable[..., list[Tensor]]:
    """Load a function (seed, *tensors) -> fields that predicts one tile in ONNX Runtime, on as many threads as torch.

    rows: the tile's size. shapes: the shape of a row of each tensor. Raises ValueError if the graph expects others.
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
    for node in session.get_inputs():
        if node.name != "seed":
            place = int(node.name.removeprefix("x"))
            if place >= len(shapes) or list(node.shape) != [rows, *shapes[place]]:
                raise ValueError(f"{path.name} expects {node.name} of shape {node.shape}, not as package.json says")

    def call(*arguments: Tensor) -> list[Tensor]:
        feed: dict[str, np.ndarray] = {}
        taken = iter(arguments) if len(names) == len(arguments) else iter(arguments[1:])
        for name in names:
            feed[name] = next(taken).numpy()
        return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feed)]

    return call
