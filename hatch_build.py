"""The build hook of the wheels: with GRANET_KERNELS=1 the compiled kernels go along, else the wheel is pure.

Compiling needs a C++ compiler ($CXX, else g++), which may be one for another processor, and the headers of an installed
torch; that torch is not imported. `make wheel` builds both wheels.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Compiles the kernels, puts them into the wheel, and names the machines that it is for."""

    def initialize(self, version, build_data):
        wanted = os.environ.get("GRANET_KERNELS", "0")
        if wanted not in ("0", "1"):
            raise ValueError(f"GRANET_KERNELS={wanted} must be 1 (compile the kernels) or 0")
        if wanted == "0" or version == "editable":
            return
        build = _build_module(Path(self.root))
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise ModuleNotFoundError(
                "GRANET_KERNELS=1 needs the headers of an installed torch: build as `make wheel` does, not in isolation"
            )
        self.folder = tempfile.TemporaryDirectory()
        library = Path(self.folder.name) / "engine.so"
        cxx = build.compiler()
        build.compile_library(cxx, library, Path(torch.origin).parent / "include", portable=True)
        for path in (library, library.with_suffix(".sha256")):
            build_data["force_include"][str(path)] = f"granet/native/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{build.architecture(cxx)}"  # auditwheel finds out how old a Linux may be

    def finalize(self, version, build_data, artifact_path):
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _build_module(root):
    spec = importlib.util.spec_from_file_location("build", root / "src" / "granet" / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
