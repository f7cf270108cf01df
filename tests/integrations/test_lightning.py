import contextlib

import pytest
import torch
from torch import nn

import granet

lightning = pytest.importorskip("lightning", reason='needs pip install "granet[lightning]"')

from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402  after the skip
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from granet.integrations.lightning import SparseTraining  # noqa: E402

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}


class Module(lightning.LightningModule):
    """The network of the plain loop; `named_parameters()` has the same names."""

    def __init__(self, problem, optimizer="sgd"):
        super().__init__()
        self.net = problem.network().net
        self._optimizer = lambda: problem.optimizer(self, optimizer)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self._optimizer()


@pytest.fixture
def fit(problem, tmp_path):
    def run(method="granet", optimizer="sgd", *, callbacks=(), resume=None, fitted=None, **arguments):
        module, sparse = fitted or (Module(problem, optimizer), SparseTraining(problem.method(method), seed=7))
        arguments = QUIET | {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path} | arguments
        trainer = lightning.Trainer(callbacks=[*callbacks, sparse], **arguments)
        trainer.fit(module, problem.loader(), ckpt_path=resume)
        return module, sparse.sparsifier, trainer

    return run


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_equals_the_plain_loop(method, optimizer, problem, fit, same):
    module, sparsifier, trainer = fit(method, optimizer)
    model, expected, _ = problem.plain(method, optimizer)
    same(module, sparsifier, model, expected)
    assert trainer.callback_metrics["sparsity"] == pytest.approx(expected.sparsity)
    assert trainer.callback_metrics["exploration"] == pytest.approx(expected.exploration)


def test_accumulation_equals_the_plain_loop(problem, fit, same):
    module, sparsifier, _ = fit(accumulate_grad_batches=2)
    model, expected, _ = problem.plain(accumulate=2)
    same(module, sparsifier, model, expected)
    assert expected.step == problem.steps // 2


def test_clipping_counts_live_gradients_alone(problem, fit, same):
    norms = []

    class Norms(lightning.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            held = [p.grad for p in module.parameters() if p.grad is not None]
            norms.extend([float(torch.nn.utils.get_total_norm(held))] * bool(held))

    module, sparsifier, _ = fit(gradient_clip_val=0.03, callbacks=[Norms()])

    assert not torch.equal(problem.plain()[0].net[0].weight, module.net[0].weight)  # clipping did something
    model = problem.network()
    expected = granet.Sparsifier(model, problem.method(), seed=7)
    optimizer = problem.optimizer(model)
    expected.attach(optimizer, hooks=False)
    for x, y in problem.loader():
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        expected.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.03)
        optimizer.step()
        expected.after_step()
    same(module, sparsifier, model, expected)
    assert max(norms) == pytest.approx(0.03, rel=1e-4)  # all that is left is live, and of the norm asked for


def test_backward_inside_the_step_sees_this_steps_gradient(problem, fit):
    """A hook before the optimizer's step would see none at the first step, and the last one's after."""
    seen = []

    class Look(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(module.net[0].weight.grad is not None)

    fit(callbacks=[Look()], max_steps=2)
    assert seen == [True, True]


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_resume_is_bitwise(method, optimizer, problem, fit, same, tmp_path):
    half = {"max_epochs": 2, "limit_train_batches": 11}  # Lightning resumes at the beginning of an epoch
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
    whole = fit(method, optimizer, callbacks=[keep], enable_checkpointing=True, **half)
    saved = tmp_path / "kept" / "epoch=0-step=11.ckpt"
    state = torch.load(saved, weights_only=True)  # nothing that would have to be unpickled
    assert {key: tuple(value.shape) for key, value in state["state_dict"].items()} == {
        key: tuple(value.shape) for key, value in Module(problem).state_dict().items()
    }
    module, sparsifier, trainer = fit(method, optimizer, resume=saved, **half)
    assert trainer.global_step == 22
    same(module, sparsifier, *whole[:2])


def test_a_checkpoint_is_evaluated(problem, fit, tmp_path):
    """By a new module and a new callback, which has no sparsifier then."""
    *_, trainer = fit(callbacks=[ModelCheckpoint(tmp_path / "kept")], enable_checkpointing=True)
    saved = next((tmp_path / "kept").glob("*.ckpt"))
    module = Module(problem)
    module.test_step = lambda batch, batch_idx: None
    new = SparseTraining(problem.method(), seed=7)
    tester = lightning.Trainer(callbacks=[new], logger=False, default_root_dir=tmp_path, **QUIET)
    tester.test(module, problem.loader(), ckpt_path=saved)
    assert new.sparsifier is None
    for mine, trained in zip(module.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, trained)


def test_autocast_equals_the_plain_loop(problem, fit, same):
    module, sparsifier, _ = fit(precision="bf16-mixed")
    model, expected, _ = problem.plain(autocast=torch.bfloat16)
    same(module, sparsifier, model, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_counted(fused, problem, fit):
    """With a fused optimizer the hooks are called all the same, and gradients are still scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module = Module(problem)
    module._optimizer = lambda: torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)
    plain_step, at = module.training_step, []

    def poisoned(batch, batch_idx):
        at.append(batch_idx)
        return plain_step(batch, batch_idx) * (float("inf") if batch_idx == 5 else 1.0)

    module.training_step = poisoned
    sparse = SparseTraining(problem.method(), seed=7)
    fit(fitted=(module, sparse), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert len(at) == problem.steps
    assert sparse.sparsifier.step == problem.steps - 1
    assert sparse.sparsifier.last_update.step == 21
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["rigl", "mest", "momentum", "top-kast"])
def test_gradients_are_those_without_a_scaler(name, fused, problem, fit):
    """The same masks and weights whatever the scale, with an overflow at step 8, which leaves no trace."""
    method = {
        "rigl": granet.RigL(sparsity=0.8, end=20, interval=3),
        "mest": granet.MEST(sparsity=0.8, halve=9, end=20, interval=3),
        "momentum": granet.RigL(sparsity=0.8, end=20, interval=3, growth="momentum"),
        "top-kast": granet.TopKAST(sparsity=0.8, interval=3, decay=0.1),
    }[name]

    def trained(scale):
        module = Module(problem)
        module._optimizer = lambda: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=fused)
        plain_step = module.training_step
        module.training_step = lambda batch, batch_idx: (
            plain_step(batch, batch_idx) * (float("inf") if batch_idx == 8 else 1.0)
        )
        sparse = SparseTraining(method, seed=7)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=0.999999, growth_interval=10_000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.forward_context = contextlib.nullcontext  # the scaler alone: in float32, powers of two lose nothing
        fit(fitted=(module, sparse), plugins=[plugin])
        return module, sparse.sparsifier

    (module, sparsifier), (other, others) = trained(2.0**4), trained(2.0**12)
    assert sparsifier.step == others.step == problem.steps - 1 and sparsifier.version > 2
    for key, mask in sparsifier.masks.items():
        assert torch.equal(mask, others.masks[key])
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_average_is_as_sparse_as_the_model(problem, fit):
    average = EMAWeightAveraging(decay=0.9)
    module, sparsifier, _ = fit(callbacks=[average])  # at its end the average is what the module holds
    for name, mask in sparsifier.masks.items():
        weight = dict(module.named_parameters())[name]
        assert not weight[~mask].any() and weight[mask].all()


def test_compiled_equals_the_plain_loop(problem, fit, same, compiles):
    module = Module(problem)
    sparse = SparseTraining(problem.method(), seed=7)
    fit(fitted=(torch.compile(module, backend=compiles), sparse))
    model, expected, _ = problem.plain()
    same(module, sparse.sparsifier, model, expected)


def test_a_sparsifier_of_ones_own_and_a_second_fit(problem, fit, same):
    module = Module(problem)
    sparsifier = granet.Sparsifier(module, problem.method(), seed=7)
    sparse = SparseTraining(sparsifier)
    fit(fitted=(module, sparse), max_steps=12)
    assert sparsifier.step == 12
    fit(fitted=(module, sparse), max_steps=2)  # another optimizer: the first one's hooks are gone
    assert sparsifier.step == 14


def test_refusals(problem, fit):
    module = Module(problem)
    with pytest.raises(ValueError, match="give seed to the Sparsifier"):
        SparseTraining(granet.Sparsifier(module, problem.method()), seed=1)
    module.automatic_optimization = False
    module._optimizer = lambda: [problem.optimizer(module.net[0]), problem.optimizer(module.net[2])]
    with pytest.raises(ValueError, match="one optimizer; the module has 2"):
        fit(fitted=(module, SparseTraining(problem.method())))


def test_tensorboard_shows_what_is_logged(problem, fit, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason='needs pip install "granet[train]"'
    )
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path / "board")
    _, sparsifier, _ = fit(logger=logger, log_every_n_steps=8)
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    shown = events.Scalars("sparsity")
    assert len(shown) == 3 and shown[-1].value == pytest.approx(sparsifier.sparsity)
    assert events.Scalars("exploration")[-1].value == pytest.approx(sparsifier.exploration)


def test_wandb_gets_what_is_logged(fit, wandb, tmp_path):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _, sparsifier, _ = fit(logger=logger, log_every_n_steps=8)
    summary = dict(logger.experiment.summary)
    assert summary["sparsity"] == pytest.approx(sparsifier.sparsity)
    assert summary["exploration"] == pytest.approx(sparsifier.exploration)


def test_mlflow_gets_what_is_logged(fit, mlflow):
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("sparse", tracking_uri=mlflow.get_tracking_uri())
    _, sparsifier, _ = fit(logger=logger, log_every_n_steps=8)
    shown = logger.experiment.get_metric_history(logger.run_id, "sparsity")
    assert len(shown) == 3 and shown[-1].value == pytest.approx(sparsifier.sparsity)
    assert logger.experiment.get_run(logger.run_id).data.metrics["exploration"] == pytest.approx(sparsifier.exploration)
