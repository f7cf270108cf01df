"""Exports: a sparse network as a file for another runtime, compared with the model before the file is kept.

One format, one module: `to_onnx` has `granet.export.onnx`, and so on. `FORMATS` lists them. Names are imported on first
use; the packages that a format needs are imported by its function alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from granet.export.formats import FORMATS as FORMATS

if TYPE_CHECKING:
    from granet.export.comparison import Export as Export
    from granet.export.network import ExportError as ExportError
    from granet.export.to_coreml import coreml as coreml
    from granet.export.to_onnx import onnx as onnx
    from granet.export.to_openvino import openvino as openvino
    from granet.export.to_pt2 import pt2 as pt2
    from granet.export.to_semi_structured import semi_structured as semi_structured
    from granet.export.to_state_dict import state_dict as state_dict

_HOME = {
    "Export": "comparison",
    "ExportError": "network",
    "coreml": "to_coreml",
    "onnx": "to_onnx",
    "openvino": "to_openvino",
    "pt2": "to_pt2",
    "semi_structured": "to_semi_structured",
    "state_dict": "to_state_dict",
}

__all__ = ["FORMATS", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
