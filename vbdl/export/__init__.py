"""Compile predictors ahead of time, for Python without a compiler, for C++ and for ONNX Runtime."""

from vbdl.export.building import export as export
from vbdl.export.gate import ExportError as ExportError
from vbdl.export.package import Package as Package
from vbdl.export.package import load_package as load_package
