"""Before tests are collected: threads are counted, torchvision made importable, examples of absent stacks set aside.

`make integrations` installs them; a test that needs one which is missing is skipped, naming its extra.
"""

import contextlib
import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: with threads besides, steps take ten times longer
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test asks for threads, they do not wait in a loop

sys.path.insert(0, str(Path(__file__).parent / "tests" / "shim"))
import torchvision_shim  # noqa: F401  imported for its effect

# what runs in the background may begin with these ignored; processes that tests start and stop would inherit that
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

_NEEDS = {
    "src/granet/integrations/lightning.py": ["lightning"],
    "src/granet/integrations/huggingface.py": ["transformers", "accelerate"],
    "docs/exports.md": ["onnx", "onnxscript", "onnxruntime"],
    "docs/integrations.md": ["lightning", "transformers", "accelerate", "timm"],
}
collect_ignore = [path for path, stacks in _NEEDS.items() if not all(map(find_spec, stacks))]

_THEIRS = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")


def pytest_collection_modifyitems(items):
    """What the stacks warn of is theirs; granet's own are RuntimeWarnings and fail a test here as everywhere."""
    for item in items:
        if "integrations" in item.path.as_posix().removeprefix(Path(__file__).parent.as_posix()):
            for rule in _THEIRS:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(autouse=True)
def log_as_it_was():
    """The command line shows the library's log; the next test begins without that."""
    logger = logging.getLogger("granet")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _registries_restored():
    """What a test registers is taken away after it."""
    from granet.methods import METHODS
    from granet.train.catalog import DATASETS, MODELS, OPTIMIZERS
    from granet.train.recipes import RECIPES

    with contextlib.ExitStack() as stack:
        for registry in (METHODS, DATASETS, MODELS, OPTIMIZERS, RECIPES):
            stack.enter_context(registry.restored())
        yield
