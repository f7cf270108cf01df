"""`granet bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Speed of a model in the engines of this machine, side by side: torch, ONNX Runtime, OpenVINO and
granet, at every precision that each has. Outputs are compared with those of torch in float32 before anything is timed,
and the engines take turns. CPU only. ONNX Runtime and OpenVINO take part after `pip install "granet[export]"`.

examples:
  granet bench runs/digits-granet-3f9a1c                 the network of a run, with its accuracy in each engine
  granet bench runs/digits-granet-3f9a1c --precision int8    int8 alone, calibrated on its training images
  granet bench runs/digits-granet-3f9a1c --training      a training step, dense and on granet's kernels
  granet bench runs/digits-granet-3f9a1c --save-compiled digits.granet   for granet.load_compiled
  granet bench resnet50 --size 224 --sparsity 0.95       a model by name, random weights and masks
  granet bench resnet20 --sparsity 0.9 --pattern 1x4     what would another pattern bring?
  granet bench timm:mobilenetv3_small_100 --batch 8      likewise; also torchvision:NAME
  granet bench mine.py:network                           what a function returns: the model, perhaps its inputs, too
  granet bench model.onnx                                an ONNX file (pip install onnx2torch)
  granet bench resnet20 --engines all                    torch.compile, too, which takes a minute to compile
  granet bench resnet20 --streams 4 --threads 8          throughput of four sessions of two threads each
  granet bench resnet20 --against 1x4 --page speed.html  what bounds each layer, would 1x4 help? with bars
  granet bench resnet20 --json > speed.json              for programs; --markdown for a table to paste"""


@dataclass(frozen=True)
class Arguments:
    """What to measure, on what."""

    source: tyro.conf.Positional[str]
    """Run directory, name of a model (`granet ls models`), timm:NAME, torchvision:NAME, module:function,
    file.py:function, or an ONNX file."""
    engines: tuple[Literal["torch", "torch.compile", "onnxruntime", "openvino", "granet", "all"], ...] = ()
    """Engines to measure besides torch in float32; all that are installed but torch.compile, if not given."""
    precision: tuple[Literal["float32", "bfloat16", "int8"], ...] = ()
    """Precisions to measure; all if not given."""
    batch: int | None = None
    """Number of images at a time; 1, or as many as in a function's own inputs, if not given."""
    threads: int | None = None
    """Threads of an engine, of all its streams together; as many as torch takes, if not given."""
    streams: int = 1
    """Sessions that run at the same time, for the throughput; the latency is that of one alone."""
    seconds: float = 3.0
    """How long the engines take turns, all together."""
    images: int = 500
    """Test images of a run for the accuracy, spread evenly over the test set; 0 for none."""
    cpu_time: bool = False
    """Measure processor time instead of time that passes: for --threads 1 on a busy machine."""
    training: bool = False
    """Measure a training step instead of inference."""
    sparsity: float | None = None
    """Sparsity of random masks. If not given, 0.9 for a model by name; a run, a function or a file keeps its own."""
    distribution: Literal["erk", "er", "uniform"] = "erk"
    """How that sparsity is distributed over the layers."""
    pattern: str | None = None
    """Pattern of random masks, such as 1x4."""
    size: int | None = None
    """Height and width of images; those of the model, or 32, if not given."""
    markdown: bool = False
    """Print Markdown."""
    json: bool = False
    """Print JSON."""
    layers: bool = False
    """Also say of each layer of granet's fastest network how long it takes and what bounds it."""
    against: str | None = None
    """Pattern, such as 1x4: would the layers be faster with as many weights in it? Implies --layers."""
    checkpoint: Literal["best", "last"] | None = None
    """Checkpoint of a run; the best by validation if there is one, else the last, if not given."""
    page: Path | None = None
    """HTML file to write, with the tables and bars."""
    save_compiled: Path | None = None
    """File to which granet's compiled network is saved, for `granet.load_compiled`; in float32, or in the one precision
    that is given."""


def main(args: list[str]) -> int:
    """Prints the report; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet bench", description=DESCRIPTION)
    if arguments.training and (arguments.markdown or arguments.json):
        raise words.UsageError("a training step is printed as text: leave out --markdown and --json")

    if arguments.training and arguments.page is not None:
        raise words.UsageError("a page shows inference: leave out --training or --page")

    from granet.lab.bench import command

    options = dict(vars(arguments))
    markdown, as_json, path = options.pop("markdown"), options.pop("json"), options.pop("page")
    if path is not None:
        from granet.lab.bench import page

        page.check(path)
    found = command.main(**options)
    say(found.json() if as_json else found.markdown() if markdown else found)
    if path is not None:
        page.write(found, path)
        if not as_json:
            say(f"page: {path}")
    if arguments.save_compiled is not None and found.not_saved:
        raise ValueError(found.not_saved)
    return 0
