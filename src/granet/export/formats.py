"""The file formats that a network can be exported to; what their functions import is imported by these alone."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        function: the function that writes it, whose module is called `to_` and its name.
        suffix: what its files' names end with.
        precisions: those it can be written in.
        packages: what the function imports.
        extra: the extra of granet that brings these packages.
        about: a line for people.
    """

    function: str
    suffix: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str
    about: str

    def require(self) -> None:
        """Checks that the packages are installed, before any work is done.

        Raises:
            ModuleNotFoundError: some are not; the message names them and the extra.
        """
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            needs = f"exporting as {self.about} needs {', '.join(missing)}"
            raise ModuleNotFoundError(f'{needs}: pip install "granet[{self.extra}]"')

    def write(self, *arguments: Any, **options: Any) -> Any:
        """Returns the `Export` that the function returns."""
        module = import_module(f"granet.export.to_{self.function}")
        return getattr(module, self.function)(*arguments, **options)


FORMATS = {
    "onnx": Format(
        "onnx", ".onnx", ("float32", "int8"), ("onnx", "onnxscript", "onnxruntime"), "export", "an ONNX file"
    ),
    "openvino": Format(
        "openvino", ".xml", ("float32", "int8"), ("openvino", "nncf"), "export", "an OpenVINO file (.xml and .bin)"
    ),
    "pt2": Format("pt2", ".pt2", ("float32",), (), "export", "a program of torch.export"),
    "coreml": Format("coreml", ".mlpackage", ("float32",), ("coremltools",), "coreml", "a Core ML package"),
    "state-dict": Format("state_dict", ".safetensors", ("float32",), (), "export", "a dense state dict"),
}
