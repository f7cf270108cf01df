"""`granet prune`."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from granet.cli import words
from granet.cli.terminal import Console, say

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """Prune a trained language model of transformers in one shot, without training it.

Wanda and SparseGPT look at activations, so they need a text to calibrate on. Give one of the kind that the model is
used on; a few hundred thousand tokens are enough. Its last tenth is held out: the perplexity there is printed, before
and after. Embeddings and the output layer stay dense. The memory needed is that of the model and of one block.

examples:
  granet prune gpt2-small --sparsity 0.5 --calibration wiki.txt                    Wanda; writes gpt2-small-wanda-0.5
  granet prune gpt2-small --sparsity 0.6 --method sparsegpt --calibration wiki.txt  the most accurate, and the slowest
  granet prune gpt2-small --sparsity 0.7 --budgets owl --calibration wiki.txt      blocks with outliers stay denser
  granet prune gpt2-small --pattern 2:4 --calibration wiki.txt                     for sparse tensor cores
  granet prune gpt2-small --method magnitude --sparsity 0.3                        needs no text

To fine-tune what is written and keep its zeros, make a `granet.Sparsifier(model, granet.Fixed())`."""


@dataclass(frozen=True)
class Arguments:
    """Which model, how sparse, and by which method."""

    model: tyro.conf.Positional[Path]
    """Folder of a language model, as `save_pretrained` of transformers writes it, with its tokenizer."""
    sparsity: float | None = None
    """Share of the weights to remove; 0.5 if not given, or what the pattern says."""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """Wanda (weights times activations), SparseGPT (also changes the weights that stay), or magnitude."""
    calibration: Path | None = None
    """Text file in UTF-8."""
    pattern: str | None = None
    """N:M pattern of the masks, such as 2:4 or 4:8."""
    budgets: str = "uniform"
    """How the weights are distributed over the layers: uniform, owl, erk, er, or densities by name as in recipes."""
    skip: tuple[str, ...] = ()
    """Layers to leave dense: names or patterns, such as model.layers.0.*"""
    samples: int = 128
    """Pieces of text to calibrate on, spread evenly over the file; and to measure on, at most."""
    length: int | None = None
    """Tokens of each piece; 2048, or as many as the model takes if that is less, if not given."""
    device: str | None = None
    """Device to compute on; a GPU if there is one, if not given."""
    out: Path | None = None
    """Folder to write, which must not exist; NAME-METHOD-SPARSITY here, if not given."""


def main(args: list[str]) -> int:
    """Prunes a model and writes it; prints a table and the perplexities; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet prune", description=DESCRIPTION)
    if arguments.calibration is None and (arguments.method != "magnitude" or arguments.budgets == "owl"):
        raise words.UsageError(
            f"--method {arguments.method} with --budgets {arguments.budgets} looks at activations: give a text file "
            "with --calibration, or choose --method magnitude --budgets uniform"
        )
    if arguments.samples < 1 or (arguments.length is not None and arguments.length < 2):
        raise words.UsageError("--samples needs a number from 1, --length one from 2")
    sparsity = 0.5 if arguments.sparsity is None and arguments.pattern is None else arguments.sparsity
    amount = sparsity if arguments.pattern is None else arguments.pattern.replace(":", "of")
    out = arguments.out or Path(f"{arguments.model.resolve().name}-{arguments.method}-{amount}")
    _check_folders(arguments.model, out)
    text = None if arguments.calibration is None else _read(arguments.calibration)

    from granet.export.staging import staged
    from granet.pruning.layers import targets
    from granet.pruning.perplexity import perplexity
    from granet.pruning.prune import prune, settings

    with _worded():
        asked = settings(sparsity, arguments.method, text is not None, arguments.pattern, arguments.budgets)
    model, tokenizer = _load(arguments)
    learn, measure = ([], []) if text is None else _pieces(arguments, model, tokenizer, text)
    with _worded(), _bar(Console(stderr=True)) as progress:
        targets(model, None, arguments.skip, asked.pattern, bool(learn))  # refuses before anything takes time
        before = perplexity(model, measure) if measure else None
        options: dict[str, Any] = {"pattern": arguments.pattern, "budgets": asked.budgets, "skip": arguments.skip}
        report = prune(model, sparsity, asked.method, learn or None, progress=progress, **options)
    say(report)
    if measure:
        after = perplexity(model, measure)
        say(f"\ncalibrated on {len(learn)} pieces of {learn[0].shape[1]} tokens of {arguments.calibration}")
        say(f"perplexity on {len(measure)} pieces of its last tenth: {before:.4g} dense, {after:.4g} pruned")
    with staged(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    say(f"written: {out}")
    return 0


def _check_folders(model: Path, out: Path) -> None:
    if not (model / "config.json").is_file():
        raise ValueError(
            f"{model} is no folder of a transformers model, because it has no config.json: write one with "
            "model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER). Runs of granet are pruned by `granet "
            "lottery`"
        )
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: move it away, or give another folder with --out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"--calibration {path} cannot be read ({error.strerror}): give a text file in UTF-8") from None


def _load(arguments: Arguments):
    """Returns the model, and its tokenizer; None in its place if there is none and none is needed."""
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError('models of transformers need it: pip install "granet[huggingface]"') from error
    import torch

    transformers.utils.logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, **here)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if arguments.calibration is not None:
            raise ValueError(
                f"{arguments.model} has no tokenizer that can be loaded ({str(error).splitlines()[0]}): write it there "
                "with tokenizer.save_pretrained(FOLDER)"
            ) from None
        tokenizer = None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", **here)
    except Exception as error:  # of many kinds: those of safetensors are no OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the model in {arguments.model} cannot be loaded ({reason}): its files may be damaged; write it again "
            "with model.save_pretrained(FOLDER)"
        ) from None
    return model.to(device).eval(), tokenizer


def _pieces(arguments: Arguments, model, tokenizer, text: str) -> tuple[list[Tensor], list[Tensor]]:
    """Returns pieces of the text to calibrate on, and held-out ones."""
    from granet.pruning import perplexity

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    ids = perplexity.tokens(tokenizer, text)
    size = model.get_input_embeddings().weight.shape[0]
    if len(ids) and int(ids.max()) >= size:
        raise ValueError(
            f"the tokenizer in {arguments.model} gives token {int(ids.max())}, and the model knows {size}: they do not "
            "belong together"
        )
    return perplexity.split(ids, arguments.length or min(2048, most), arguments.samples)


@contextmanager
def _worded():
    """Says errors of the library in the words of this command."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("skip=", "--skip ")) from error


@contextmanager
def _bar(console: Console):
    """Gives a function that is told how many layers are done, of how many; a bar on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (BarColumn(bar_width=None), TextColumn("{task.completed}/{task.total} layers"), TimeRemainingColumn())
    with Progress("pruning", *parts, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
