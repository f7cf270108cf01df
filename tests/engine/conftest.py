import sys
from pathlib import Path

import pytest
import torch

from granet import native

sys.path.append(str(Path(__file__).parent))  # small_models, and the fuzz programs, which are run by themselves as well


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Compiled once per machine; where there is no compiler only the tests that need none can say anything."""
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    from granet.engine import ops

    ops.prepare()


@pytest.fixture(autouse=True)
def threads():
    """Two of them, whatever the other tests have: kernels share their work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def always_sparse(monkeypatch):
    """Layers run sparse whatever the measurement says, so that the test does not hang on it."""
    from granet.engine import layer, timing

    monkeypatch.setattr(timing, "NOISE", -1e9)
    monkeypatch.setattr(layer, "HOPELESS", 1.0)


@pytest.fixture
def always(monkeypatch):
    """Takes the compiled model whether it is faster or not."""
    from granet.engine import search, timing

    monkeypatch.setattr(timing, "NOISE", -1e9)
    monkeypatch.setattr(search, "ROUNDS", 1)


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request, monkeypatch):
    """Float32, or bfloat16 autocast for the whole test; weights may change in it, so that none is kept rounded."""
    from granet.engine import layer

    bfloat16 = request.param == "bfloat16"
    if bfloat16:  # whatever is the fastest for so few images
        monkeypatch.setattr(layer.Forward, "_choices", lambda *_: [layer.Planes(bfloat16=True)])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        yield request.param


@pytest.fixture
def twins(monkeypatch, always_sparse, precision):
    from twins import Counted

    return Counted(monkeypatch)
