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

import torch
from transformers import TrainerCallback

from granet import masking
from granet.sparsifier import Sparsifier

FILE = "sparsifier.pt"  # in each checkpoint's folder


class SparseTraining(TrainerCallback):
    """Trains with a sparsifier that was made of the model before the Trainer. `sparsity` and `exploration` are logged.

    The Trainer clips before any callback is asked, counting the gradients of inactive weights. To clip by the norm of
    live gradients alone, give `max_norm` here and `max_grad_norm=0` to the Trainer's arguments.

    Reporters that are to see what is logged come after this callback:
    `report_to="none", callbacks=[SparseTraining(sparsifier), TensorBoardCallback()]`.

    Args:
        sparsifier: the sparsifier of the model that the Trainer is given.
        max_norm: clip live gradients to this norm, None to leave clipping to the Trainer.
    """

    def __init__(self, sparsifier: Sparsifier, *, max_norm: float | None = None):
        self.sparsifier, self.max_norm = sparsifier, max_norm

    def on_train_begin(self, args, state, control, *, optimizer, **kwargs):
        if self.max_norm is not None and args.max_grad_norm:
            raise ValueError(f"max_norm={self.max_norm} goes with max_grad_norm=0 in the Trainer's arguments")
        if state.global_step:
            given = args.resume_from_checkpoint
            self._load(Path(given if given else Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        self.sparsifier.detach()
        self.sparsifier.attach(optimizer)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.max_norm is not None:
            self.sparsifier.clip_grad_norm_(self.max_norm)

    def on_log(self, args, state, control, *, logs, **kwargs):
        now = {"sparsity": self.sparsifier.sparsity, "exploration": self.sparsifier.exploration}
        logs.update(now)
        if state.log_history:
            state.log_history[-1].update(now)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            target = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            torch.save(self.sparsifier.state_dict(), target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))
        self.sparsifier.detach()

    def _load(self, folder):
        """Take over the state in a checkpoint whose weights the Trainer has loaded."""
        if not (folder / FILE).exists():
            raise FileNotFoundError(
                f"{folder / FILE} is missing: the Trainer resumed from elsewhere, or without a sparsifier. Name the "
                "checkpoint in TrainingArguments(resume_from_checkpoint=...)"
            )
        saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        parameters = dict(self.sparsifier.model.named_parameters())
        pairs = ((masking.like(mask, parameters[name]), [parameters[name]]) for name, mask in saved["masks"].items())
        if not self.sparsifier.method.reparameterizes and masking.leaks(pairs):
            raise ValueError(f"{folder / FILE} does not fit the weights that the Trainer has loaded")
        self.sparsifier.load_state_dict(saved)
