"""The reference loop: how granet trains, in plain torch, to be read and copied.

`Trainer` builds everything from a recipe and runs the steps. It reports through `record`, as mappings that
`granet.train.run` writes to `metrics.jsonl`, and calls `save` whenever its state is to be saved.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet import flops, ranks
from granet.engine.fake_quantisation import FakeQuantisation
from granet.engine.training import TrainingPlan, accelerate
from granet.methods.dense import Dense
from granet.probe import Probe
from granet.sparsifier import Sparsifier, masking, stepping
from granet.train import initial, models, optimizer
from granet.train.checkpoint import Checkpoint, distrusted, restore_layout
from granet.train.health import Health, slow_bf16
from granet.train.images import Images
from granet.train.recipe import Recipe
from granet.train.scores import Best, Evaluation, Tally

logger = logging.getLogger(__name__)

Record = Callable[[dict[str, Any]], None]
Masks = Mapping[str, Tensor]


class TrainingError(ArithmeticError):
    """Training that cannot go on; the message names the step and what to try."""


class Trainer:
    """A training run in memory: data, model, sparsifier, optimizer, and how far it has come.

    Args:
        recipe: what to train, on what, how.
        begins: whether it begins with the weights of `train.init`; not where a checkpoint is to be loaded.

    Raises:
        ValueError: the recipe and the data do not fit each other.
        FileNotFoundError: the dataset is not there; the message says where to get it.

    >>> from granet.train import recipes
    >>> from granet.train.recipe import validate
    >>> recipe = recipes.load("digits").model_dump()
    >>> trainer = Trainer(validate(recipe | {"train": {"epochs": 1, "lr": 0.01, "batch_size": 64}}, source="example"))
    >>> trainer.steps, trainer.sparsifier.sparsity
    (20, 0.5)
    """

    def __init__(self, recipe: Recipe, *, begins: bool = True):
        self.recipe = recipe
        self.ranks = ranks.current()
        torch.manual_seed(recipe.seed)
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        with self.ranks.guard():  # nodes differ in their GPUs
            self.device = self.ranks.device(recipe.train.device)
        self.images = Images(recipe, self.ranks, self.device)
        self.dataset, self.splits = self.images.dataset, self.images.splits
        self.steps_per_epoch = self.images.steps_per_epoch
        self.steps = self.steps_per_epoch * recipe.train.epochs
        self.end = min(self.steps, recipe.train.max_steps or self.steps)
        for warning in recipe.train.warnings(self.steps_per_epoch, slow_bf16(self.device)) if self.ranks.first else ():
            logger.warning(warning)
        self.settings = recipe.train.counted(self.steps_per_epoch)
        if self.settings.engine == "sparse" and self.ranks.world > 1:
            raise ValueError(f"train.engine: 'sparse' runs in one process, not in {self.ranks.world}; write 'dense'")
        shape = self.dataset.shape
        model = models.build(recipe.model.name, classes=self.dataset.classes, in_channels=shape[0])
        self.layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        masks = initial.load(recipe, self.model, self.ranks) if begins else None
        method = recipe.resolve(self.steps_per_epoch)
        skip, planned = recipe.skipped(self.model), recipe.plan(self.model, self.steps_per_epoch)
        self.target, self.units = planned.final_active, planned.sparse_units  # weights, blocks or channels
        probe = self.probe(self.settings.probe) if method.needs_probe else None
        self.flops = flops.count(self.model, torch.zeros(1, *shape, device=self.device))
        options = {"skip": skip, "seed": recipe.seed, "probe": probe, "masks": masks, "storage": self.settings.storage}
        self.sparsifier = Sparsifier(self.model, method, pattern=recipe.model.pattern, **options)
        spared = self.sparsifier.masks if method.decays else ()
        self.optimizer = optimizer.build(self.model, self.settings, spared=spared)
        self.sparsifier.attach(self.optimizer)
        self.ema = None
        if self.settings.ema:
            self.ema = copy.deepcopy(self.model).requires_grad_(False)
            self.sparsifier.follow(self.ema)
        self.quantisation = FakeQuantisation(self.model, self.settings.quantise)
        if self.ema is not None:
            self.quantisation.follow(self.ema)
        self.replica = self.ranks.replica(self.model)
        self.training_flops = self.seconds = 0.0
        self.best: Best | None = None
        self.engine: TrainingPlan | None = None  # the layers that run on sparse kernels
        self._costs: tuple[int, float, float] = (-1, 0.0, 0.0)
        self.health = Health()
        self._window: list[tuple[int, Tensor, Tensor]] = []  # step, loss, accuracy since the last line of the log

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return self.sparsifier.step

    @property
    def eligible(self) -> bool:
        """Whether the network is as sparse as asked: only then does an evaluation count."""
        return self.target is None or self.sparsifier.active_units <= self.target

    def fit(self, *, record: Record, save: Callable[[], None], stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the end, from wherever the trainer stands; returns False if `stop` ended it early.

        Args:
            record: called with each record, on all ranks.
            save: called whenever the state is to be saved, on all ranks.
            stop: called after every step; True saves and ends the training.

        Raises:
            TrainingError: the loss is not finite.
        """
        settings, saved = self.settings, -1
        if settings.engine == "sparse" and self.engine is None:
            shape = (settings.batch_size // settings.accumulate, *self.dataset.shape)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=settings.bf16):
                self.engine = accelerate(self.sparsifier, torch.zeros(shape).to(memory_format=self.layout))

        def after_step() -> bool:
            nonlocal saved
            last = self.step in (*settings.stages, self.end)
            if (update := self.sparsifier.last_update) is not None and update.step == self.step:
                record(self._update_record(update))
            if self.step % settings.log == 0 or last:
                record(self.train_record())
            better = (self.step % settings.evaluate == 0 or last) and self._validate(record)
            stopped = self.ranks.any(stop())
            kept = self.step in settings.keep
            if self.step % settings.checkpoint == 0 or kept or better or last or stopped:
                self.refuse_non_finite()
                save()
                saved = self.step
            return stopped

        if not self.train_until(self.end, after_step=after_step):
            return False
        self.sparsifier.verify()
        if saved != self.step:
            save()
        return True

    def train_until(self, step: int, *, lr: float | None = None, after_step: Callable[[], bool] | None = None) -> bool:
        """Trains until `step` optimizer steps are taken; returns False if it was ended before that.

        Args:
            step: it may lie beyond the end of the recipe's training if `lr` is given.
            lr: the learning rate of all these steps; by default that of the recipe.
            after_step: called after each step; True ends the training.
        """
        settings = self.settings
        forward = torch.compile(self.replica, mode=settings.compile) if settings.compile else self.replica
        self.model.train()
        clock = time.perf_counter()
        while self.step < step:
            for x, y in self.ranks.each(self.images.epoch_from(self.step)):
                self.train_step(forward, x, y, lr)
                self.seconds += time.perf_counter() - clock
                ended = after_step is not None and after_step()
                clock = time.perf_counter()
                if self.step == step:
                    break
                if ended:
                    return False
        return True

    def restart(self, found: Checkpoint, masks: Masks, *, kept: Masks | None = None) -> None:
        """Puts the network where a checkpoint was taken, to train from there with other masks, which stay as they are.

        Model, optimizer, moving average and random state are those of the checkpoint, which is not changed.

        Args:
            found: the checkpoint, of a training with this recipe's network.
            masks: the active weights, by name of the parameter; other parameters are dense.
            kept: those that keep their values and optimizer state, by default all; the others start from zero.
        """
        self.sparsifier.detach()
        with distrusted(found.path):
            self.model.load_state_dict(found.model)
            # a copy: the optimizer would train on in the buffers of the checkpoint itself
            restore_layout(copy.deepcopy(found.state["optimizer"]), self.optimizer)
            torch.set_rng_state(found.state["rng"])
            self.quantisation.load_state_dict(found.state.get("quantisation", {}))
        parameters = dict(self.model.named_parameters())
        for name, mask in (kept or {}).items():
            p = parameters[name]
            masking.clear([(masking.like(mask, p), [p.detach(), *stepping.buffers([self.optimizer], p)])])
        self.sparsifier = Sparsifier(self.model, Dense(), only=list(masks), masks=masks)
        self.sparsifier.step = found.step
        self.sparsifier.attach(self.optimizer)
        if self.ema is not None:
            self.ema.load_state_dict(found.state["ema"])
            self.sparsifier.follow(self.ema)
        self._costs = (-1, 0.0, 0.0)
        self._window.clear()

    def probe(self, batches: int) -> Probe:
        """Returns a probe of the gradients on the first training batches, without augmentation."""
        example = torch.zeros(1, *self.dataset.shape, device=self.device)
        return Probe(self.model, self.images.first(batches), example=example)

    def train_step(self, forward: nn.Module, x: Tensor, y: Tensor, lr: float | None = None) -> None:
        """Takes one optimizer step on this rank's share of a batch, with the recipe's learning rate or with `lr`."""
        settings, sparsifier = self.settings, self.sparsifier
        size = self.images.trained_on(self.step + 1) - self.images.trained_on(self.step)  # of this batch, on all ranks
        if lr is None:
            lr = optimizer.learning_rate(settings, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        total, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        parts = list(zip(x.chunk(settings.accumulate), y.chunk(settings.accumulate), strict=True))
        for part, labels in self.ranks.turns(forward, parts):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=settings.bf16):
                logits = forward(part.to(memory_format=self.layout))
                loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            parts_in_all = size / (self.ranks.world * len(labels))  # the mean over ranks is that over the batch
            (loss / parts_in_all).backward()
            total += loss.detach() / parts_in_all
            correct += (logits.detach().argmax(1) == labels).sum()
        correct /= size / self.ranks.world
        # batch norms have seen this rank's examples alone: the mean of what they recorded is every rank's from here on
        seen = [self.quantisation.ranges, *(b for b in self.model.buffers() if b.is_floating_point())]
        self.ranks.mean_([total, correct, *seen])
        self._window.append((self.step + 1, total, correct))
        if sparsifier.update_due:
            self.refuse_non_finite()  # before the topology is built on it
        if settings.clip_norm:
            sparsifier.clip_grad_norm_(settings.clip_norm)

        self.training_flops += size * self._cost(dense_gradient=sparsifier.dense_grad_due)
        self.optimizer.step()  # the sparsifier acts here: inactive weights stay zero, the topology is renewed when due
        self.optimizer.zero_grad()
        if self.ema is not None:
            optimizer.average_(self.ema, self.model, settings.ema, self.step)

    def _cost(self, *, dense_gradient: bool) -> float:
        """Returns the FLOPs of training on one example, with the current topology."""
        if self._costs[0] != self.sparsifier.version:
            more = {"trained": self.sparsifier.trained, "explored": self.sparsifier.method.explores}
            counts, cost = self.sparsifier.counts, self.flops.training_step
            self._costs = (self.sparsifier.version, *(cost(counts, dense_gradient=d, **more) for d in (False, True)))
        return self._costs[1 + dense_gradient]

    def refuse_non_finite(self) -> None:
        """Raises TrainingError if a loss since the last look was infinite or NaN; waits for the device."""
        if not self._window:
            return
        losses = torch.stack([loss for _, loss, _ in self._window]).tolist()
        for (step, *_), loss in zip(self._window, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step}; any checkpoint is from before it. Try a lower train.lr "
                    f"(now {self.settings.lr:g}), a longer train.warmup, or train.clip_norm"
                )

    def train_record(self) -> dict[str, Any]:
        """Returns means over the steps since the last record; raises TrainingError if a loss was not finite."""
        self.refuse_non_finite()
        loss, accuracy = torch.stack([torch.stack(entry) for _, *entry in self._window]).mean(0).tolist()
        self._window.clear()
        lr = optimizer.learning_rate(self.settings, self.step - 1, self.steps)
        return self._record("train", loss=loss, accuracy=accuracy, lr=lr, sparsity=self.sparsifier.sparsity)

    def _update_record(self, update) -> dict[str, Any]:
        return self._record(
            "update",
            sparsity=self.sparsifier.sparsity,
            regeneration=self.sparsifier.method.regeneration_at(self.step),
            exploration=self.sparsifier.exploration,
            active=dict(update.active),
            grown=dict(update.grown),
            dropped=dict(update.dropped),
        )

    def _record(self, kind: str, **values) -> dict[str, Any]:
        return {"kind": kind, "step": self.step, "epoch": self.step / self.steps_per_epoch} | values

    def _validate(self, record: Record) -> bool:
        """Evaluates, records the result, and returns whether it is the best so far at target sparsity."""
        began = time.perf_counter()
        self.sparsifier.refresh()
        score = self.evaluate("validation")
        values = {"split": "validation", "loss": score.loss, "accuracy": score.accuracy}
        values |= {"sparsity": self.sparsifier.sparsity, "realised_sparsity": self.realised_sparsity()}
        record(self._record("eval", **values, eligible=self.eligible, seconds=time.perf_counter() - began))
        best = self.best
        better = best is None or (score.accuracy, -score.loss) > (best.accuracy, -best.loss)
        if better and self.eligible:
            self.best = Best(score.loss, score.accuracy, step=self.step)
        self.health.check(self, score.loss)
        return better and self.eligible

    @torch.no_grad()
    def evaluate(self, split: Literal["train", "validation", "test"]) -> Evaluation:
        """Returns loss and accuracy of the network, or of its moving average if there is one, in evaluation mode."""
        network = self.model if self.ema is None else self.ema
        training = network.training
        network.eval()
        tally = Tally(self.dataset.classes, self.device)
        with self.ranks.guard():  # an image may be broken
            for x, y in self.images.once(split, self.settings.evaluate_images):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
                    logits = network(x.to(memory_format=self.layout)).float()
                tally.add(logits, y)
        network.train(training)
        self.ranks.sum_(tally.sums)
        return tally.evaluation()

    @torch.no_grad()
    def realised_sparsity(self) -> float:
        """Returns the share of exact zeros among the sparse parameters: regrown weights start from zero."""
        return 1 - sum(layer.nonzero for layer in self.sparsifier.report().layers) / self.sparsifier.total

    def summary(self) -> dict[str, Any]:
        """Returns what was trained and what it cost, without accuracies."""
        counts = self.sparsifier.counts
        total, sparse = sum(map(math.prod, self.flops.shapes.values())), self.sparsifier.total
        return {
            "name": self.recipe.name,
            "method": self.recipe.method.name,
            "model": self.recipe.model.name,
            "pattern": self.recipe.model.pattern,
            "data": self.recipe.data.name,
            "seed": self.recipe.seed,
            "sparsity": self.sparsifier.sparsity,
            "target_sparsity": None if self.target is None else 1 - self.target / self.units,
            "exploration": self.sparsifier.exploration,
            "parameters": {"total": total, "sparse": sparse, "active": total - sparse + self.sparsifier.active},
            "flops": {
                "inference": self.flops.inference(counts),
                "inference_dense": self.flops.inference(),
                "training": self.training_flops,
                "training_dense": self.flops.training_step() * self.images.trained_on(self.step),
            },
            "seconds": self.seconds,
            "steps": self.step,
            "epochs": self.recipe.train.epochs,
            "evaluate_images": self.recipe.train.evaluate_images,
            "layers": [
                {key: getattr(layer, key) for key in ("name", "shape", "total", "active", "flops")}
                for layer in self.flops.per_layer(counts)
            ],
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns all of the state but the model's: numbers, names and tensors, nested."""
        return {
            # raw parameters of reparameterised methods; the checkpoint's model holds the effective weights
            "model": self.model.state_dict() if self.sparsifier.method.reparameterizes else None,
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "quantisation": self.quantisation.state_dict(),
            "best": None if self.best is None else asdict(self.best),
            "training_flops": self.training_flops,
            "seconds": self.seconds,
            "window": [list(entry) for entry in self._window],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Puts the trainer where `model` and `state` were taken, to train on from there.

        Raises:
            ValueError: they belong to another model or method.
        """
        try:
            self.model.load_state_dict(dict(state["model"] or model))
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.sparsifier.load_state_dict(state["sparsifier"])  # buffers have the size of what it makes active
            restore_layout(state["optimizer"], self.optimizer)
            self.quantisation.load_state_dict(state.get("quantisation", {}))
            self.best = None if state["best"] is None else Best(**state["best"])
            self.training_flops, self.seconds = state["training_flops"], state["seconds"]
            self._window = [(at, *torch.stack(both).to(self.device).view(2)) for at, *both in state["window"]]
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint does not fit this recipe: {error}") from error
        self._costs = (-1, 0.0, 0.0)
