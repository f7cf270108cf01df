"""One of two processes, with what torchrun gives them in the environment: `ranks.py STACK [STACK] FOLDER`.

Writes masks and weights after training to `FOLDER/<stack>-<rank>.pt`.
"""

import sys
from pathlib import Path

import torch
from problem import Network, Problem

import granet


def lightning(problem, model, folder):
    import lightning

    from granet.integrations.lightning import SparseTraining

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model.net

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return problem.optimizer(self, "adamw")

        def train_dataloader(self):
            sampler = torch.utils.data.DistributedSampler(problem.pairs, 2, self.global_rank, shuffle=False)
            return torch.utils.data.DataLoader(problem.pairs, problem.batch, sampler=sampler)

    sparse = SparseTraining(problem.method(), seed=7)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[sparse],
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(Module())
    return sparse.sparsifier


def accelerate(problem, model, folder):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    prepared = accelerator.prepare(model, problem.optimizer(model, "adamw"), problem.loader())
    wrapped, optimizer, loader = prepared
    assert type(wrapped).__name__ == "DistributedDataParallel"
    sparsifier.attach(optimizer)
    for x, y in loader:
        accelerator.backward(wrapped(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


def fabric(problem, model, folder):
    from lightning.fabric import Fabric

    fab = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fab.launch()
    sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    wrapped, optimizer = fab.setup(model, problem.optimizer(model, "adamw"))
    sparsifier.attach(optimizer)
    sampler = torch.utils.data.DistributedSampler(problem.pairs, 2, fab.global_rank, shuffle=False)
    for x, y in torch.utils.data.DataLoader(problem.pairs, problem.batch, sampler=sampler):
        fab.backward(wrapped(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


def huggingface(problem, model, folder):
    import transformers

    from granet.integrations.huggingface import SparseTraining

    sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=problem.batch,
        num_train_epochs=1,
        max_grad_norm=0,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=problem.steps // 2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    optimizers = (problem.optimizer(model, "adamw"), None)
    callbacks = [SparseTraining(sparsifier)]
    trainer = transformers.Trainer(model, args, train_dataset=problem.dicts, optimizers=optimizers, callbacks=callbacks)
    trainer.train()
    return sparsifier


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    torch.set_num_threads(1)
    for stack in sys.argv[1:-1]:
        sparsifier = globals()[stack](Problem(torch.float64), Network().double(), folder)
        weights = {name: p.detach() for name, p in sparsifier.model.named_parameters()}
        found = {"masks": sparsifier.masks, "weights": weights, "step": sparsifier.step}
        torch.save(found, folder / f"{stack}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
