"""One of two processes, with what torchrun gives them in the environment: `ranks.py RUN [RUN] FOLDER`.

A run is `STACK-ddp` or `STACK-fsdp2`. Writes masks and weights, in one piece, after training to `FOLDER/RUN-<rank>.pt`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from problem import Network, Problem, Text
from torch.distributed.fsdp import fully_shard

import granet
from granet.integrations import distributed_checkpoint as checkpoints
from granet.ranks import leave


def sharded(model, mesh=None):
    """FSDP2 in two groups: the first layer, and the rest."""
    fully_shard(model.net[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def lightning(problem, shard, folder):
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from granet.integrations.lightning import SparseTraining

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Network().double()

        def configure_model(self):
            if shard:
                sharded(self.model, self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            return self.model(*batch)["loss"]

        def configure_optimizers(self):
            return problem.optimizer(self, "adamw")

        def train_dataloader(self):
            sampler = torch.utils.data.DistributedSampler(problem.pairs, 2, self.global_rank, shuffle=False)
            return torch.utils.data.DataLoader(problem.pairs, problem.batch, sampler=sampler)

    def fit(resume=None, **limits):
        sparse = SparseTraining(problem.method(), seed=7 if resume is None else 8)
        trainer = lightning.Trainer(
            accelerator="cpu",
            strategy=ModelParallelStrategy(2, 1) if shard else "ddp",
            devices=2,
            callbacks=[sparse],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            **limits,
        )
        trainer.fit(Module(), ckpt_path=resume)
        return sparse.sparsifier, trainer

    sparsifier, trainer = fit(max_epochs=1)
    if shard:  # and resuming from shards
        trainer.save_checkpoint(folder / "saved")
        uncut, _ = fit(max_epochs=2)
        resumed, _ = fit(folder / "saved", max_epochs=2)
        assert resumed.step == uncut.step == problem.steps and resumed.version == uncut.version
        for name, mask in uncut.masks.items():
            assert torch.equal(unsharded(mask), unsharded(resumed.masks[name]))
        for mine, theirs in zip(resumed.model.parameters(), uncut.model.parameters(), strict=True):
            assert torch.equal(unsharded(mine), unsharded(theirs))
    return sparsifier


def accelerate(problem, shard, folder):
    """accelerate leaves its FSDP plugin aside on a CPU: the model is sharded before, and is not given to it."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = sharded(Network().double()) if shard else Network().double()
    sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    optimizer, loader = accelerator.prepare(problem.optimizer(model, "adamw"), problem.loader())
    wrapped = model if shard else accelerator.prepare(model)
    assert shard or type(wrapped).__name__ == "DistributedDataParallel"
    sparsifier.attach(optimizer)
    for x, y in loader:
        accelerator.backward(wrapped(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


def fabric(problem, shard, folder):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(lambda model, mesh: sharded(model, mesh["data_parallel"]), 2, 1)
    fab = Fabric(accelerator="cpu", strategy=strategy if shard else "ddp", devices=2)
    fab.launch()

    def made(seed):
        wrapped = fab.setup_module(Network().double())
        model = wrapped.module
        sparsifier = granet.Sparsifier(model, problem.method(), seed=seed)  # of the shards, which setup_module makes
        optimizer = fab.setup_optimizers(problem.optimizer(model, "adamw"))
        sparsifier.attach(optimizer)
        return wrapped, optimizer, sparsifier

    wrapped, optimizer, sparsifier = made(seed=7)
    sampler = torch.utils.data.DistributedSampler(problem.pairs, 2, fab.global_rank, shuffle=False)
    for x, y in torch.utils.data.DataLoader(problem.pairs, problem.batch, sampler=sampler):
        fab.backward(wrapped(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        if shard and sparsifier.step == 5:  # go on with what is read back
            checkpoints.save(folder / "fabric", sparsifier.model, optimizer.optimizer, sparsifier)
            wrapped, optimizer, sparsifier = made(seed=8)
            checkpoints.load(folder / "fabric", sparsifier.model, optimizer.optimizer, sparsifier)
    return sparsifier


def huggingface(problem, shard, folder):
    import transformers

    from granet.integrations.huggingface import SparseTraining

    text = Text()
    model = text.model(folder, transformers.DistributedConfig(fsdp_size=2)) if shard else Network().double()
    args = transformers.TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=text.batch if shard else problem.batch,
        num_train_epochs=1,
        max_grad_norm=0,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=problem.steps // 2,
        save_only_model=shard,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    sparse = SparseTraining(problem.method(), seed=7, only=text.layers if shard else None)
    optimizers = (problem.optimizer(model, "adamw"), None)
    data, loss = (text.dicts, text.loss) if shard else (problem.dicts, None)
    trainer = transformers.Trainer(
        model, args, train_dataset=data, optimizers=optimizers, callbacks=[sparse], compute_loss_func=loss
    )
    trainer.train()
    return sparse.sparsifier


def timm(problem, shard, folder):
    """As timm's training script does it; sharding it has none."""
    from timm.utils import NativeScaler, init_distributed_device

    args = SimpleNamespace(device="cpu")
    init_distributed_device(args)
    assert args.distributed and args.world_size == 2
    model = Network().double()
    sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    optimizer = problem.optimizer(model, "adamw")
    sparsifier.attach(optimizer)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    scaler = NativeScaler("cpu")
    sampler = torch.utils.data.DistributedSampler(problem.pairs, 2, args.rank, shuffle=False)
    for x, y in torch.utils.data.DataLoader(problem.pairs, problem.batch, sampler=sampler):
        scaler(wrapped(x, y)["loss"], optimizer, parameters=model.parameters())
        optimizer.zero_grad()
    return sparsifier


def unsharded(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    torch.set_num_threads(1)
    for run in sys.argv[1:-1]:
        stack, way = run.split("-")
        sparsifier = globals()[stack](Problem(torch.float64), way == "fsdp2", folder)
        weights = {name: unsharded(p.detach()) for name, p in sparsifier.model.named_parameters()}
        masks = {name: unsharded(mask) for name, mask in sparsifier.masks.items()}
        shards = sum(hasattr(p, "full_tensor") for p in sparsifier.model.parameters())
        found = {"masks": masks, "weights": weights, "step": sparsifier.step, "shards": shards}
        torch.save(found, folder / f"{run}-{torch.distributed.get_rank()}.pt")
    leave()
