import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for processes that tests start as well
from problem import Problem


@pytest.fixture(scope="session")
def problem():
    pytest.importorskip("sklearn", reason='needs pip install "granet[train]"')
    return Problem()


@pytest.fixture
def same():
    """Asserts that two models and their sparsifiers are the same to the bit, and that something was trained."""

    def check(model, sparsifier, other, others, *, updates=3):
        assert others.version >= updates and sparsifier.version == others.version
        assert sparsifier.step == others.step
        theirs = dict(other.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, theirs[name]), name
        for name, mask in others.masks.items():
            assert torch.equal(sparsifier.masks[name], mask), name
            assert not dict(model.named_parameters())[name][~mask].any()
        assert sparsifier.exploration == others.exploration

    return check


@pytest.fixture
def clips(problem, same):
    """Asserts that a stack clips by the norm of all gradients, the sparsifier by that of live ones, as plain loops do.

    `train` is given who clips, "stack" or "sparsifier", and gives back a model and its sparsifier.
    """

    def check(train):
        theirs, ours = train("stack"), train("sparsifier")
        dense = problem.plain(clip=lambda sparsifier, model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.03))
        same(*theirs, *dense[:2])
        same(*ours, *problem.plain(clip=lambda sparsifier, model: sparsifier.clip_grad_norm_(0.03))[:2])
        assert not torch.equal(theirs[0].net[0].weight, ours[0].net[0].weight)

    return check


@pytest.fixture
def compiles():
    """A backend of torch.compile that calls no C++ compiler. Asserts that a graph was compiled with gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield "aot_eager"
    assert torch._dynamo.utils.counters["aot_autograd"]["total"]


@pytest.fixture
def eager():
    """timm's kron compiles its step, which takes long and changes nothing of what is asked."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Weights & Biases, offline."""
    found = pytest.importorskip("wandb", reason="needs pip install wandb")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    for name, value in (offline | {"WANDB_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    yield found
    found.finish()


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a folder of its own for what it is told."""
    found = pytest.importorskip("mlflow", reason="needs pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would take seconds to make
    before = found.get_tracking_uri()
    found.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield found
    found.set_tracking_uri(before)
