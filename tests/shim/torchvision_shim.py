"""Makes a torchvision importable whose compiled part was built for another torch, as its wheels beside a CPU torch are.

timm and transformers import torchvision where it is installed, and it dies without two of its operators. They are
declared right before it is imported, if its library does not load; nothing else happens.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path


class Finder(MetaPathFinder):
    declared = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.declared is None:
            import torch

            spec = PathFinder.find_spec(name, path)
            libraries = Path(spec.origin).parent.glob("_C*.so") if spec else ()
            for library in libraries:
                try:
                    torch.ops.load_library(library)
                except OSError:
                    self.declared = torch.library.Library("torchvision", "DEF")
                    for operator in ("nms", "qnms"):
                        self.declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                    break
        return None


if not any(type(finder).__name__ == "Finder" and hasattr(finder, "declared") for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())
