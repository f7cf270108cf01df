"""`granet train`."""

from dataclasses import dataclass, replace
from pathlib import Path

from granet.cli.arguments import Request, parse
from granet.train import recipes
from granet.train.recipe import Recipe, validate

DESCRIPTION = """Train a network from a recipe. The same command again goes on where it stopped.

examples:
  granet train                                            digits, GraNet to 90 % sparsity
  granet train --twin                                     beside the same network, dense
  granet train fashion --method.sparsity 0.98 --seed 3    other settings
  granet train cifar10-vgg19 --method rigl                another method, with the settings it has in the recipe
  granet train cifar10-vgg19-rigl                         the same
  granet train cifar10-vgg19 --engine sparse              on the sparse kernels, where they are faster (CPU)
  granet train digits --method fixed --init-from RUN      from another run's weights; fixed: within its masks
  granet train cifar10-vgg19 --max-steps 15 --train.evaluate-images 500   a quick look
  granet train my.yaml --train.epochs 9 --train.bf16 true a recipe of your own"""


@dataclass(frozen=True)
class Options:
    """Where, and beside what."""

    runs: Path = Path("runs")
    """Folder of run directories."""
    twin: bool = False
    """Train the same network dense as well, and compare."""


def main(args: list[str]) -> int:
    """Trains, shows the table, writes the report; returns the exit code."""
    request = parse(args, Options, prog="granet train", description=DESCRIPTION)
    if request.recipe.train.init is not None:
        request = replace(request, recipe=pinned(request.recipe))
    wanted = [request.recipe]
    if request.options.twin and request.recipe.method.name != "dense":
        wanted.append(twin(request))

    from granet.cli.session import train_all
    from granet.train.run import Run

    return train_all([Run.for_recipe(recipe, request.options.runs) for recipe in wanted])


def pinned(recipe: Recipe) -> Recipe:
    """Returns the recipe that begins with the weights of the very checkpoint that is the run's best, or last, now."""
    from granet.train import initial

    path = initial.source(Path(recipe.train.init))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"init": str(path)})})


def twin(request: Request) -> Recipe:
    """Returns the recipe that differs from the one asked for in its method alone, which is dense, without a pattern."""
    name = f"{request.recipe.name}-dense"  # of a run with a name of its own
    if request.recipe.name == request.loaded.name:
        name = recipes.load(request.source, method="dense").name
    values = request.recipe.model_dump()
    values |= {"method": {"name": "dense"}, "model": values["model"] | {"pattern": "unstructured"}, "name": name}
    return validate(values, source=request.source)
