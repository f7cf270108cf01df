"""The command line: one small file per command, nothing heavy imported before it is needed."""

import os
import sys
from importlib import import_module

from granet.names import nearest

COMMANDS = {
    "train": "train a network from a recipe, beside its dense twin if asked",
    "lottery": "train, prune, go back, train again: lottery tickets, one-shot pruning",
    "resume": "go on with a run that was stopped",
    "eval": "accuracy of a run's checkpoint",
    "sweep": "train a grid of methods, settings and seeds, with a table and plots",
    "compare": "table and plots of several runs",
    "plasticity": "prune a network along its training, and see how well it recovers",
    "sensitivity": "accuracy of a run against sparsity, one layer pruned at a time",
    "connectivity": "overlap of masks between runs and through a run, dead units",
    "prune": "prune a trained language model in one shot: Wanda, SparseGPT, magnitude",
    "plan": "every parameter of a recipe's network: sparse or not, why, its budget",
    "show": "a recipe with every default written out",
    "bench": "speed of any model on the engines of this machine, side by side",
    "export": "a run's network as a file for another runtime, compared with the run",
    "share": "a run's network in a folder or on the Hugging Face Hub, with a model card",
    "info": "tensors of a file: shapes, densities, bytes against dense and the limit",
    "ls": "list recipes, methods, models, data or optimizers",
}

HELP = f"""usage: granet COMMAND ...

Train sparse neural networks that stay sparse: GraNet and its family.

commands:
{"".join(f"  {name:13}{about}{chr(10)}" for name, about in COMMANDS.items())}
examples:
  granet train                                   digits, GraNet to 90 % sparsity, in a minute
  granet train --twin                            the same, beside the dense network
  granet train fashion --method.sparsity 0.98    another recipe, one setting changed
  granet train cifar10-vgg19 --method rigl       another method, as the paper set it
  granet sweep digits                            methods side by side, over sparsities and seeds
  granet compare runs/*                          table and plots

`granet COMMAND --help` tells more.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns its exit code, 2 for what the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from granet import __version__

        print(f"granet {__version__}")
        return 0
    command = args[0]
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return _fail(f"there is no command {command!r}; {hint}(commands: {', '.join(COMMANDS)})")
    try:
        return import_module(f"granet.cli.{command}").main(args[1:])
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stdout = None
        return 0
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("GRANET_TRACEBACK"):
            raise
        return _fail(str(error))
    except SystemExit as done:  # the parser has said what there is to say
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    rank = f" on rank {os.environ['RANK']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
    from granet.text import printable, worded

    print(printable(f"granet: error{rank}: {worded(message)}"), file=sys.stderr)
    return 2
