"""For processes that tests start with this folder in PYTHONPATH."""

import torchvision_shim  # noqa: F401  imported for its effect
