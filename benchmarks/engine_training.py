"""Accelerated sparse training against dense PyTorch and sparseprop, interleaved, gradients checked first.

    python benchmarks/engine_training.py layers --sparsity 0.9 0.95
    python benchmarks/engine_training.py steps --model vgg19 --batch 64
    python benchmarks/engine_training.py memory --model resnet50-cifar --batch 32
    python benchmarks/engine_training.py run --model vgg19 --recipe cifar10-vgg19 --engine sparse --out runs.jsonl
    python benchmarks/engine_training.py chart --out runs.jsonl --figure runs.svg

`layers` times forward + backward of the convolutions of a CIFAR ResNet-50, `linear` of linear layers; `steps` whole
training steps, with the optimizer and a fixed mask, in float32 and under bfloat16 autocast, contiguous and
channels_last; `memory` takes the most memory that steps hold; `run` trains a network by a recipe on a part of its
dataset, from 50 % to 95 % sparsity, and notes time and accuracy after every epoch; `chart` draws such runs. sparseprop
and SparseLab take part where installed. Dense PyTorch is the faster of its two layouts in `layers`.
THP_MEM_ALLOC_ENABLE=1 in the environment makes torch ask for huge pages, which spares all contenders most of the page
faults that the large outputs of thin layers cost.
"""

import argparse
import datetime
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from engine_inference import processor
from torch import nn

import granet
from granet.engine import ops, reference
from granet.engine.spec import Spec
from granet.engine.training import accelerate
from granet.lab.bench.training import training_step
from granet.report.charts import COLOURS, DENSE_COLOUR
from granet.train import recipes
from granet.train.models import build
from granet.train.recipe import validate
from granet.train.trainer import Trainer

# in, out, kernel, stride, input size: the kinds of layer in a ResNet-50 for 32x32 images
LAYERS = [
    (64, 64, 3, 1, 32),
    (64, 256, 1, 1, 32),
    (256, 64, 1, 1, 32),
    (128, 128, 3, 2, 32),
    (128, 128, 3, 1, 16),
    (512, 128, 1, 1, 16),
    (256, 256, 3, 1, 8),
    (1024, 256, 1, 1, 8),
    (512, 512, 3, 1, 4),
    (2048, 512, 1, 1, 4),
]


def turns(calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each call, taking turns for `seconds`, five turns at least."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, spent.values())) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            spent[name].append((clock() - start) * 1e3)
    return spent


def both(forward: Callable[[torch.Tensor], torch.Tensor], wanted: list[torch.Tensor], dy: torch.Tensor) -> object:
    return torch.autograd.grad(forward(wanted[0]), wanted, dy)


def layers(settings: argparse.Namespace, clock: Callable[[], float]) -> None:
    print("| layer | sparsity | dense ms | sparseprop ms | granet ms | vs dense | vs sparseprop |")
    print("|---|---|---|---|---|---|---|")
    for channels, outputs, kernel, stride, size in LAYERS:
        for sparsity in settings.sparsity:
            torch.manual_seed(0)
            spec = Spec(
                in_channels=channels,
                out_channels=outputs,
                kernel=(kernel, kernel),
                stride=(stride, stride),
                padding=(kernel // 2, kernel // 2),
            )
            mask = torch.rand(spec.weight_shape) >= sparsity
            weight = (torch.randn(spec.weight_shape) * mask).requires_grad_()
            x = torch.randn(settings.batch, channels, size, size, requires_grad=True)
            dy = torch.randn(settings.batch, outputs, *spec.output_size((size, size)))

            def dense(x, weight=weight, stride=stride, kernel=kernel):
                return nn.functional.conv2d(x, weight, None, stride, kernel // 2)

            last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
            last_dy = dy.to(memory_format=torch.channels_last)
            calls = {
                "dense": lambda d=dense, x=x, w=weight, dy=dy: both(d, [x, w], dy),
                "dense last": lambda d=dense, x=last, w=weight, dy=last_dy: both(d, [x, w], dy),
            }
            for batch in {1, ops.cpu()[0]}:
                place = ops.layout(mask, spec, tuple(x.shape), batch)
                calls[f"granet {batch}"] = lambda x=x, w=weight, dy=dy, p=place: both(
                    lambda t: ops.conv(t, w, None, p), [x, w], dy
                )
                found = calls[f"granet {batch}"]()
                expected = reference.conv_gradients(dy, x.detach(), weight.detach(), mask, spec)
                for a, b in zip(found, expected, strict=True):
                    if not ((a - b).abs().max() / b.abs().max()).item() < 1e-4:
                        raise SystemExit("a gradient is wrong")
            try:
                from sparseprop.modules.conv2d import SparseConv2d

                for over_on in (False, True):
                    rival = SparseConv2d(weight.detach(), None, kernel // 2, stride, vectorizing_over_on=over_on)
                    calls[f"sparseprop {over_on}"] = lambda r=rival, x=x, dy=dy: both(r, [x, r.W_val], dy)
            except ImportError:
                pass
            spent = {name: min(times) for name, times in turns(calls, settings.seconds, clock).items()}

            def best(prefix: str, spent: dict[str, float] = spent) -> float | None:
                return min((t for n, t in spent.items() if n.startswith(prefix)), default=None)

            ours, rival = best("granet"), best("sparseprop")
            cells = [f"{rival:.1f}", f"{rival / ours:.2f}x"] if rival else ["not installed", "-"]
            print(
                f"| {channels}->{outputs} {kernel}x{kernel}/{stride} at {size} | {sparsity:.0%} | {best('dense'):.1f} "
                f"| {cells[0]} | {ours:.1f} | {best('dense') / ours:.2f}x | {cells[1]} |",
                flush=True,
            )


def linear(settings: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Forward + backward of linear layers, beside SparseLab's, each with a random topology of its own."""
    try:
        from sparselab import SparseLinear
    except ImportError:
        SparseLinear = None  # noqa: N806 - the name it has
    print("| layer | sparsity | dense ms | sparselab ms | granet ms | vs dense | vs sparselab |")
    print("|---|---|---|---|---|---|---|")
    for channels, outputs in ((1024, 1024), (3072, 1024), (1024, 4096)):
        for sparsity in settings.sparsity:
            torch.manual_seed(0)
            spec = Spec(in_channels=channels, out_channels=outputs)
            mask = torch.rand(outputs, channels) >= sparsity
            weight = (torch.randn(outputs, channels) * mask).requires_grad_()
            x, dy = torch.randn(settings.batch, channels, requires_grad=True), torch.randn(settings.batch, outputs)
            place = ops.layout(mask, spec, tuple(x.shape))
            calls = {
                "dense": lambda x=x, w=weight, dy=dy: both(lambda t: nn.functional.linear(t, w), [x, w], dy),
                "granet": lambda x=x, w=weight, dy=dy, p=place: both(lambda t: ops.conv(t, w, None, p), [x, w], dy),
            }
            if SparseLinear is not None:
                rival = SparseLinear(channels, outputs, bias=False, sparsity=sparsity)
                values = list(rival.parameters())
                calls["sparselab"] = lambda r=rival, x=x, v=values, dy=dy: both(r, [x, *v], dy)
            spent = {name: min(times) for name, times in turns(calls, settings.seconds, clock).items()}
            rival, ours = spent.get("sparselab"), spent["granet"]
            cells = [f"{rival:.1f}", f"{rival / ours:.2f}x"] if rival else ["not installed", "-"]
            print(
                f"| {channels}->{outputs} | {sparsity:.0%} | {spent['dense']:.1f} | {cells[0]} | {ours:.1f} "
                f"| {spent['dense'] / ours:.2f}x | {cells[1]} |",
                flush=True,
            )


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "mlp":
        widths = [784, 1024, 1024, 1024]
        hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(1024, 10)), (784,)
    return build(name, classes=10, in_channels=3), (3, 32, 32)


def steps(settings: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Whole training steps in every precision and memory format that a user could run, with granet's plan and without.

    The losses of the first steps are compared before the timing.
    """
    print("| model | batch | sparsity | step | least ms | median ms | layers sparse |\n|---|---|---|---|---|---|---|")
    for name in settings.model:
        for sparsity in settings.sparsity:
            torch.manual_seed(0)
            model, shape = network(name)
            method = granet.Static(sparsity=sparsity, distribution=settings.distribution)
            # Blocks of inputs do not fit three colours, so the first layer stays dense in a pattern.
            skip = () if settings.pattern == "unstructured" else next(iter(dict(model.named_parameters())))
            granet.Sparsifier(model, method, skip=skip, pattern=settings.pattern)
            report = training_step(model, torch.randn(settings.batch, *shape), repeats=settings.repeats)
            for step, spread in report.steps.items():
                kind, setting = step.split(", ", maxsplit=1)
                rows = report.plans[setting].layers
                sparse = sum(row.chosen == "sparse" for row in rows) if kind == "granet" else "-"
                cells = [name, settings.batch, f"{sparsity:.0%}", step, f"{spread.least:.1f}", f"{spread.median:.1f}"]
                print("|", " | ".join(map(str, [*cells, sparse])), "|", flush=True)
            ratio = report.dense_ms / report.fast_ms
            print(f"| {name} | {settings.batch} | {sparsity:.0%} | fastest dense / fastest granet | {ratio:.2f}x | | |")


def peak(name: str, batch: int, sparsity: float | None) -> tuple[float, float]:
    """MiB the process held at most in three training steps, and while planning; dense where `sparsity` is None.

    The second step is one before an update, whose weight gradient is dense.
    """

    def most() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    torch.manual_seed(0)
    model, shape = network(name)
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    method = granet.RigL(sparsity=sparsity or 0.9, distribution="uniform", end=10, interval=2)
    sparsifier = granet.Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsifier.attach(optimizer)
    if sparsity is not None:
        accelerate(sparsifier, x)
    planning = most()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return most(), planning


def memory(settings: argparse.Namespace) -> None:
    """The most memory of training steps, each contender in a fresh process."""
    print("| model | batch | | steps, MiB | against dense | planning, MiB |\n|---|---|---|---|---|---|")
    for name in settings.model:
        dense = None
        for sparsity in (None, *settings.sparsity):
            with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (settings.threads or 1,)) as pool:
                steps, planning = pool.apply(peak, (name, settings.batch, sparsity))
            dense = dense or steps
            row = "dense" if sparsity is None else f"granet {sparsity:.0%}"
            print(
                f"| {name} | {settings.batch} | {row} | {steps:.0f} | {steps / dense:.2f}x | {planning:.0f} |",
                flush=True,
            )


class Timed(Trainer):
    """A trainer that evaluates on some images only, and keeps the time that evaluating takes apart."""

    def __init__(self, recipe, clocks: dict[str, Callable[[], float]]):
        super().__init__(recipe)
        for split, images in (("validation", 500), ("test", 2000)):
            self.splits[split] = self.splits[split][torch.arange(images)]
        self.clocks, self.apart = clocks, dict.fromkeys(clocks, 0.0)

    def evaluate(self, split: str):
        """As the trainer does."""
        begin = {name: clock() for name, clock in self.clocks.items()}
        score = super().evaluate(split)
        for name, clock in self.clocks.items():
            self.apart[name] += clock() - begin[name]
        return score


def run(settings: argparse.Namespace) -> None:
    """One training run; a line of JSON with time and accuracy of every epoch, and the accuracy on test images."""
    values = recipes.load(settings.recipe).model_dump()
    total = {"cifar10": 50_000, "cifar100": 50_000, "fashion-mnist": 60_000}[values["data"]["name"]]
    values["data"]["validation"] = total - settings.images
    values["model"]["name"] = settings.model[0]
    values["train"] |= {
        "epochs": settings.epochs,
        "batch_size": settings.batch,
        "lr": settings.lr,
        "engine": settings.engine,
        "threads": settings.threads,
        "log": "100%",
    }
    values["method"] |= {
        "sparsity": settings.sparsity[0],
        "initial_sparsity": 0.5,
        "end": "50%",
        "interval": settings.interval,
    }
    values["seed"] = settings.seed
    clocks = {"processor": time.process_time, "wall": time.perf_counter}
    trainer = Timed(validate(values, source="benchmark"), clocks)
    begin, curve = {name: clock() for name, clock in clocks.items()}, []

    def record(entry: dict) -> None:
        if entry["kind"] == "eval":
            spent = {name: clock() - begin[name] - trainer.apart[name] for name, clock in clocks.items()}
            found = {"epoch": entry["epoch"], "accuracy": entry["accuracy"], "sparsity": entry["sparsity"]}
            curve.append({name: round(value, 4) for name, value in (spent | found).items()})
            print(curve[-1], flush=True)

    trainer.fit(record=record, save=lambda: None)
    test = trainer.evaluate("test").accuracy
    settings_of = {
        key: getattr(settings, key) for key in ("recipe", "engine", "seed", "images", "batch", "epochs", "lr")
    }
    line = settings_of | {"model": settings.model[0], "test": test, "curve": curve}
    print(line)
    if trainer.engine is not None:
        print(trainer.engine.report())
    if settings.out:
        with settings.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def chart(settings: argparse.Namespace) -> None:
    """Accuracy over time of the runs in a file, as an SVG."""
    import altair

    runs = [json.loads(line) for line in settings.out.read_text().splitlines()]
    points = [
        {
            "engine": r["engine"],
            "run": f"{r['engine']} {r['seed']}",
            "accuracy": 100 * p["accuracy"],
            "time": p[settings.clock],
        }
        for r in runs
        for p in r["curve"]
    ]
    colours = altair.Scale(domain=["dense", "sparse"], range=[DENSE_COLOUR, COLOURS[0]])
    lines = (
        altair.Chart(altair.Data(values=points))
        .mark_line(point=True)
        .encode(
            x=altair.X("time:Q", title=f"training, seconds of {settings.clock} time"),
            y=altair.Y("accuracy:Q", title="validation accuracy, %", scale=altair.Scale(zero=False)),
            color=altair.Color("engine:N", scale=colours),
            detail="run:N",
        )
        .properties(width=520, height=260)
    )
    lines.save(str(settings.figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layers", "linear", "steps", "memory", "run", "chart"))
    parser.add_argument("--model", nargs="+", default=["vgg19"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10, help="for each table row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5, help="of steps: rounds that are measured")
    parser.add_argument("--distribution", default="erk", help="of steps: how the sparsity is distributed over layers")
    parser.add_argument("--pattern", default="unstructured", help="of steps: the pattern of the masks, such as 1x4")
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for one thread on a busy machine")
    of_run = parser.add_argument_group("run and chart")
    of_run.add_argument("--recipe", default="fashion")
    of_run.add_argument("--engine", choices=("dense", "sparse"), default="dense")
    of_run.add_argument("--images", type=int, default=3200, help="of the training set")
    of_run.add_argument("--epochs", type=int, default=6)
    of_run.add_argument("--interval", default="10it", help="between two updates of the topology")
    of_run.add_argument("--lr", type=float, default=0.05)
    of_run.add_argument("--seed", type=int, default=0)
    of_run.add_argument("--out", type=Path, help="file to append the result to")
    of_run.add_argument("--figure", type=Path, help="file of the chart")
    of_run.add_argument("--clock", choices=("wall", "processor"), default="wall", help="of the chart")
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processor_time = settings.cpu_time or (settings.what == "steps" and torch.get_num_threads() == 1)
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {'processor' if processor_time else 'wall'} time\n"
    )
    if settings.what == "run":
        return run(settings)
    if settings.what == "chart":
        return chart(settings)
    if settings.what == "memory":
        return memory(settings)
    clock = time.process_time if settings.cpu_time else time.perf_counter
    {"layers": layers, "linear": linear, "steps": steps}[settings.what](settings, clock)


if __name__ == "__main__":
    main()
