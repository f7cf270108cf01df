import sys
from pathlib import Path

import pytest

from granet import native

sys.path.append(str(Path(__file__).parent))  # fuzz_layers and fuzz_models, which are programs as well


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Compiled once per machine; where there is no compiler only the tests that need none can say anything."""
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    from granet.engine import ops

    ops.prepare()
