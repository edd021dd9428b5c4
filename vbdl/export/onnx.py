"""Write the graph of a tile's prediction as an ONNX file, and run it in ONNX Runtime."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vbdl.export.graph import TileCall
from vbdl.nn.recurrent_layer import recurrent_layer


def write(call: TileCall, arguments: tuple[Tensor, ...], path: Path) -> None:
    """Write the call as one ONNX file that includes the weights; ModuleNotFoundError without the extra `onnx`."""
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the ONNX export needs the extra `onnx`: pip install 'vbdl[onnx]'") from error
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for node in call.module.graph.nodes:
        if node.target is recurrent_layer:
            _, _, _, weights, _, biases, bidirectional, _ = node.args
            if len(weights) // (2 if bidirectional else 1) > (4 if biases else 2):
                raise ValueError("ONNX has no LSTM with projections (proj_size)")
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
            custom_translation_table={recurrent_layer: recurrent},
        )
    _name_outputs(path, call.fields)


# the places of ONNX's gates among torch's: update, reset, new; in, out, forget, new
_GATES = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def recurrent(x, batch_sizes, states, weights, kind, biases, bidirectional, stacked):
    """Write one recurrent layer by ONNX's operator GRU, LSTM or RNN: (steps, batch, inputs) -> outputs, h, c.

    Arguments as in `vbdl.nn.recurrent_layer`, in values of ONNX.
    """
    from onnxscript import opset18

    op: Any = opset18

    directions = 2 if bidirectional else 1
    size = len(weights) // directions
    gates = _GATES[kind]
    hidden = states[0].shape[-1]

    def ordered(t):
        parts = [op.Slice(t, [g * hidden], [(g + 1) * hidden], [0]) for g in gates]
        return op.Concat(*parts, axis=0) if len(parts) > 1 else t

    def joined(parts):  # along a new first axis, of directions
        parts = [op.Unsqueeze(t, [0]) for t in parts]
        return op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    of = [weights[d * size : (d + 1) * size] for d in range(directions)]
    w, r = (joined([ordered(each[i]) for each in of]) for i in range(2))
    bias = joined([op.Concat(ordered(each[2]), ordered(each[3]), axis=0) for each in of]) if biases else None
    options: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if bidirectional else "forward"}
    if kind == "gru":
        outputs = op.GRU(x, w, r, bias, None, states[0], linear_before_reset=1, **options)
    elif kind == "lstm":
        outputs = op.LSTM(x, w, r, bias, None, *states, **options)
    else:
        outputs = op.RNN(x, w, r, bias, None, states[0], activations=[_ACTIVATIONS[kind]] * directions, **options)
    steps, rows = x.shape[:2]  # (steps, directions, batch, hidden) -> (steps, batch, directions * hidden)
    out = op.Reshape(op.Transpose(outputs[0], perm=[0, 2, 1, 3]), [steps, rows, directions * hidden])
    return out, outputs[1], outputs[2] if kind == "lstm" else op.Constant(value_floats=[])


_ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}


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
