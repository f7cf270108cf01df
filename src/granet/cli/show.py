"""`granet show`."""

import json
from dataclasses import dataclass

from granet.cli.arguments import parse
from granet.train.recipe import schema

DESCRIPTION = """A recipe with every default written out, as YAML that `granet train FILE.yaml` takes.

examples:
  granet show cifar10-vgg19
  granet show cifar10-vgg19 --method rigl --method.sparsity 0.98 > mine.yaml
  granet show --schema > recipe.schema.json               for an editor that completes and checks recipes"""


@dataclass(frozen=True)
class Options:
    """What to show."""

    schema: bool = False
    """The JSON schema of recipe files instead."""


def main(args: list[str]) -> int:
    """Prints a recipe, or the schema of all; returns the exit code."""
    request = parse(args, Options, prog="granet show", description=DESCRIPTION)
    print(
        json.dumps(schema(), indent=2) if request.options.schema else request.recipe.to_yaml(),
        end="\n" * request.options.schema,
    )
    return 0
