"""One problem for every stack, and the plain loop that each is compared with."""

import argparse
from pathlib import Path

import torch
from torch import nn

import granet

BATCH = 32
STEPS = 24


class Network(nn.Module):
    """A classifier of 8x8 digits in the shape that each stack likes: `forward(x, labels)` has loss and logits."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x, labels=None):
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Problem:
    """Digits in a fixed order, and the plain loop over them."""

    network, batch, steps = Network, BATCH, STEPS

    def __init__(self, dtype=torch.float32):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.x = torch.tensor(images, dtype=dtype)[: BATCH * STEPS] / 16
        self.y = torch.tensor(labels)[: BATCH * STEPS]

    @property
    def pairs(self):
        return torch.utils.data.TensorDataset(self.x, self.y)

    @property
    def dicts(self):
        return [{"x": x, "labels": y} for x, y in zip(self.x, self.y, strict=True)]

    def loader(self, batch=BATCH):
        return torch.utils.data.DataLoader(self.pairs, batch)

    def method(self, name="granet"):
        if name == "rigl":
            return granet.RigL(sparsity=0.8, end=20, interval=3)
        return granet.GraNet(sparsity=0.8, initial_sparsity=0.3, end=9, total=24, interval=3)

    def optimizer(self, model, name="sgd"):
        if name == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=0.01)
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def average(self, model):
        rule = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rule)

    def plain(
        self, method="granet", optimizer="sgd", *, accumulate=1, clip=None, autocast=None, make=None, average=None
    ):
        """Model, or its average, sparsifier and optimizer after the loop that everybody writes.

        Args:
            method: the method's name.
            optimizer: the optimizer's name.
            accumulate: batches to a step.
            clip: called with the sparsifier and the model when gradients are final, before the step.
            autocast: the dtype of `torch.autocast`.
            make: makes the model.
            average: makes its average.
        """
        model = (make or Network)()
        sparsifier = granet.Sparsifier(model, self.method(method), seed=7)
        optimizer = self.optimizer(model, optimizer)
        sparsifier.attach(optimizer)
        averaged = average and average(model)
        if averaged:
            sparsifier.follow(averaged)
        for i, (x, y) in enumerate(self.loader()):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = model(x, y)["loss"] / accumulate
            loss.backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    clip(sparsifier, model)
                optimizer.step()
                optimizer.zero_grad()
                if averaged:
                    averaged.update_parameters(model)
        return averaged.module if averaged else model, sparsifier, optimizer


class Text:
    """Bytes of a file that every Python has, and a small GPT-2 for them: 24 sequences of 16 at a step."""

    batch, length = 12, 16

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        size = 2 * self.batch * self.length * STEPS // 2
        self.rows = torch.tensor(list(Path(argparse.__file__).read_bytes()[:size])).view(-1, self.length)
        self.layers = [Conv1D]

    @property
    def dicts(self):
        return [{"input_ids": row, "labels": row} for row in self.rows]

    def write(self, folder):
        """Puts the model where `model` reads it."""
        import transformers

        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "n_positions": self.length}
        config = transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, dtype="float64")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.GPT2LMHeadModel(config).double().save_pretrained(folder / "gpt2")

    def loss(self, outputs, labels, num_items_in_batch=None):
        """The mean over what all ranks see at a step, in float64; that of transformers is in float32."""
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / (2 * self.batch * (self.length - 1))

    def model(self, folder, distributed=None):
        import transformers

        if distributed is not None:
            distributed.fsdp_plan = {"transformer.h.*": "free_full_weight"}
        return transformers.GPT2LMHeadModel.from_pretrained(
            folder / "gpt2", dtype=torch.float64, distributed_config=distributed
        )
