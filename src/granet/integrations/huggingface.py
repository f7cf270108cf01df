"""Hugging Face Trainer: a callback that ties a sparsifier to the Trainer's optimizer and saves it in its checkpoints.

>>> import granet, tempfile, torch, transformers
>>> from granet.integrations.huggingface import SparseTraining
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8)
>>> model = transformers.GPT2LMHeadModel(config)
>>> conv1d = transformers.pytorch_utils.Conv1D  # GPT-2's linear layer, its weight transposed
>>> sparsifier = granet.Sparsifier(model, granet.GMP(sparsity=0.8, end=6, interval=2), only=conv1d)
>>> data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (16, 8))]
>>> folder = tempfile.TemporaryDirectory()
>>> quiet = dict(report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no", use_cpu=True)
>>> args = transformers.TrainingArguments(folder.name, max_steps=8, per_device_train_batch_size=4, **quiet)
>>> trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[SparseTraining(sparsifier)])
>>> _ = trainer.train()
{'train_runtime': ...}
>>> sparsifier.step, round(sparsifier.sparsity, 3)
(8, 0.8)
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from granet.integrations import adapter
from granet.methods.base import Method
from granet.ranks import current
from granet.sparsifier import Sparsifier, masking
from granet.sparsifier.reparameterize import is_reparameterized

FILE = "sparsifier.pt"  # in each checkpoint's folder


class SparseTraining(TrainerCallback):
    """Trains a Trainer's model sparse. `sparsity` and `exploration` (R_s) are logged.

    The Trainer clips before any callback is asked, counting the gradients of inactive weights. To clip by the norm of
    live gradients alone, give `max_norm` here and `max_grad_norm=0` to the Trainer's arguments.

    Reporters that are to see what is logged come after this callback:
    `report_to="none", callbacks=[SparseTraining(sparsifier), TensorBoardCallback()]`.

    Args:
        method: a sparsifier, made of the model that the Trainer is given. Or a method, for a Trainer that makes models
            by `model_init` (hyper-parameter search) or replaces their parameters (FSDP): a sparsifier is then made of
            each model that comes to be trained.
        max_norm: clip live gradients to this norm, None to leave clipping to the Trainer.
        **options: of `granet.Sparsifier`, where a method is given: `only`, `skip`, `seed`, `pattern`.

    Attributes:
        sparsifier: the `Sparsifier`, None until training begins if a method was given.
    """

    def __init__(self, method: Method | Sparsifier, *, max_norm: float | None = None, **options: Any):
        self.sparsifier = adapter.ready_made(method, options)
        self._method = method if self.sparsifier is None else None
        self._options, self.max_norm = options, max_norm
        if self._method is not None and self._method.reparameterizes:
            name = type(method).__name__
            raise ValueError(f"{name} gives the model parameters of its own: make a Sparsifier before the Trainer")

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
        if self.max_norm is not None and args.max_grad_norm:
            raise ValueError(f"max_norm={self.max_norm} goes with max_grad_norm=0 in the Trainer's arguments")
        make = self._method is not None and (self.sparsifier is None or self.sparsifier.model is not model)
        saved = None
        if state.global_step:
            folder = current().decide(lambda: args.resume_from_checkpoint or written(args, state))
            saved = read(folder, model if make else self.sparsifier.model)
        if make:
            self.sparsifier = Sparsifier(model, self._method, masks=saved and saved["masks"], **self._options)
        if saved:
            self.sparsifier.load_state_dict(saved)
        self.sparsifier.detach()
        try:
            self.sparsifier.attach(optimizer)
        except ValueError as error:
            raise ValueError(
                f"{error}. Where the Trainer makes models itself (model_init, hyper-parameter search) or replaces "
                "their parameters (FSDP), give SparseTraining a method instead of a Sparsifier"
            ) from error

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.max_norm is not None:
            self.sparsifier.clip_grad_norm_(self.max_norm)

    def on_log(self, args, state, control, *, logs, **kwargs):
        if self.sparsifier is not None:
            now = {"sparsity": self.sparsifier.sparsity, "exploration": self.sparsifier.exploration}
            logs.update(now)
            state.log_history[-1].update(now)

    def on_save(self, args, state, control, **kwargs):
        whole = adapter.unsharded_state(self.sparsifier.state_dict())
        with current().guard():
            if args.should_save:
                part = (written(args, state) / FILE).with_suffix(".part")
                torch.save(whole, part)
                part.replace(part.with_name(FILE))

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.sparsifier.load_state_dict(read(state.best_model_checkpoint, self.sparsifier.model))
        self.sparsifier.detach()


def written(args, state):
    """The folder of the Trainer's latest checkpoint; in hyper-parameter search each trial has a folder for its own."""
    name = f"checkpoint-{state.global_step}"
    found = Path(args.output_dir).glob(f"*/{name}" if state.is_hyper_param_search else name)
    return max(found, key=lambda folder: folder.stat().st_mtime_ns, default=Path(args.output_dir) / name)


def read(folder, model):
    """The sparsifier's state in a checkpoint whose weights the Trainer has loaded into `model`, read by rank 0."""
    path = Path(folder) / FILE
    saved = current().decide(lambda: _loaded(path))
    weights = dict(model.named_parameters())
    pairs = ((masking.like(mask, weights[name]), [weights[name]]) for name, mask in saved["masks"].items())
    if not is_reparameterized(model) and masking.leaks(pairs):
        raise ValueError(f"{path} does not fit the weights that the Trainer has loaded")
    return saved


def _loaded(path):
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the Trainer resumed from elsewhere, or without a sparsifier. Name the checkpoint in "
            "TrainingArguments(resume_from_checkpoint=...)"
        )
    return torch.load(path, map_location="cpu", weights_only=True)
