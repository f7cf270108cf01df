"""Lightning: a callback that makes the module sparse when a fit begins, keeps it so, and is saved with the run.

>>> import granet, lightning, torch
>>> from granet.integrations.lightning import SparseTraining
>>> from lightning.pytorch.demos.boring_classes import BoringModel
>>> sparse = SparseTraining(granet.GMP(sparsity=0.5, end=30, interval=10))
>>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
>>> trainer = lightning.Trainer(max_epochs=1, limit_train_batches=40, limit_val_batches=0, callbacks=[sparse], **quiet)
>>> trainer.fit(BoringModel())
>>> sparse.sparsifier.step, sparse.sparsifier.sparsity, trainer.callback_metrics["sparsity"]
(40, 0.5, tensor(0.5000))
"""

from typing import Any

from lightning.pytorch.callbacks import Callback, WeightAveraging

from granet.integrations import adapter
from granet.methods.base import Method
from granet.sparsifier import Sparsifier
from granet.sparsifier.stepping import found_inf


class SparseTraining(Callback):
    """Trains a module of one optimizer sparse. `sparsity` and `exploration` (R_s) are logged by the module's own log.

    Gradients are masked before Lightning clips them, so that the norm is that of live gradients. A `WeightAveraging`
    callback's average is kept sparse as well.

    Args:
        method: what decides about the topology; the sparsifier is then made of the whole module, before its optimizer,
            or behind it where the strategy shards the module. Or a `Sparsifier`.
        **options: of `granet.Sparsifier`, where a method is given: `only`, `skip`, `seed`, `pattern`.

    Attributes:
        sparsifier: the `Sparsifier`, None until a fit begins if a method was given.
    """

    def __init__(self, method: Method | Sparsifier, **options: Any):
        self.sparsifier = adapter.ready_made(method, options)
        self._method, self._options, self._logged = method, options, None
        self._hooks, self._in_step = (), False

    def setup(self, trainer, pl_module, stage):
        # strategies that read checkpoints late replace the parameters until then
        if stage == "fit" and not trainer.strategy.restore_checkpoint_after_setup:
            self._make(pl_module)

    def _make(self, module):
        if self.sparsifier is None:
            self.sparsifier = Sparsifier(module, self._method, **self._options)

    def on_fit_start(self, trainer, pl_module):
        if len(trainer.optimizers) != 1:
            raise ValueError(f"SparseTraining goes with one optimizer; the module has {len(trainer.optimizers)}")
        self._make(pl_module)

    def on_train_start(self, trainer, pl_module):
        # not before, because torch steps a new optimizer once to read a sharded checkpoint
        self._release()
        self.sparsifier.attach(*trainer.optimizers, hooks=False)
        optimizer = trainer.optimizers[0]
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                self.sparsifier.follow(callback._average_model)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        # a hook of the optimizer would come too late: backward runs inside its step, and clipping behind that
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # but an optimizer that unscales gradients itself knows their scale, and an overflow, in its step alone
        self._in_step = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        overflow = scaler is not None and not self._in_step and any(scaler._found_inf_per_device(optimizer).values())
        if not (self._in_step or overflow):
            self.sparsifier.before_step()

    def _before_step(self, optimizer, args, kwargs):
        if self._in_step:
            self.sparsifier.before_step()

    def _after_step(self, optimizer, args, kwargs):
        if not found_inf(optimizer):
            self.sparsifier.after_step()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._logged is None or self._logged[0] != self.sparsifier.version:
            now = {"sparsity": self.sparsifier.sparsity, "exploration": self.sparsifier.exploration}
            self._logged = self.sparsifier.version, now
        pl_module.log_dict(self._logged[1])

    def teardown(self, trainer, pl_module, stage):
        self._release()

    def _release(self):
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self.sparsifier.detach()
            self._hooks = ()

    def state_dict(self):
        return {} if self.sparsifier is None else adapter.unsharded_state(self.sparsifier.state_dict())

    def load_state_dict(self, state_dict):
        if self.sparsifier is not None:  # None where a checkpoint is evaluated: its weights have their zeros
            self.sparsifier.load_state_dict(state_dict)
