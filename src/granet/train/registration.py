"""`granet.register`: what a package of your own calls to add methods, models, datasets, optimizers and recipes."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

from granet.methods.base import METHODS, Method
from granet.names import described
from granet.train.catalog import DATASETS, MODELS, OPTIMIZERS, Architecture, OptimizerKind, Source
from granet.train.recipes import RECIPES

M = TypeVar("M", bound=type[Method])
F = TypeVar("F", bound=Callable[..., Any])


def kebab(name: str) -> str:
    """Returns the name of a class in lower case, with a dash before each word.

    >>> [kebab(name) for name in ("Static", "MyMethod", "DropALot", "SET", "TopKAST")]
    ['static', 'my-method', 'drop-a-lot', 'set', 'top-kast']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


class Register:
    """Adds what is not part of granet to its registries; the command line and recipes then know it by its name.

    Called as a decorator of a method's class, with or without a name. `model`, `dataset`, `optimizer` and `recipe` add
    the other kinds. All raise ValueError where the name is taken or cannot be one.
    """

    @overload
    def __call__(self, method: M) -> M: ...

    @overload
    def __call__(self, method: str) -> Callable[[M], M]: ...

    def __call__(self, method):
        """Registers a method: a frozen dataclass derived from `granet.Method`.

        Args:
            method: the class, whose name in kebab-case becomes the name of the method; or that name.

        Raises:
            TypeError: it is no dataclass derived from `granet.Method`.
        """
        if isinstance(method, str):
            return METHODS.add(method)
        if not isinstance(method, type):
            raise TypeError(f"granet.register decorates a class or takes a name, not {described(method)}")
        return METHODS.add(kebab(method.__name__))(method)

    def model(self, name: str, *, description: str | None = None) -> Callable[[F], F]:
        """Returns a decorator of a function `build(classes, in_channels)` that returns a `torch.nn.Module`.

        Args:
            name: what a recipe calls it, in `model.name`.
            description: a line for `granet ls models`; by default the first of the function's docstring.
        """

        def decorate(build: F) -> F:
            MODELS.add(name, defined_by=build)(Architecture(description or _first_line(build), build))
            return build

        return decorate

    def dataset(
        self,
        name: str,
        *,
        classes: int,
        shape: tuple[int, int, int],
        description: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        find: Callable[[Path], Path | None] = lambda root: root,
        advice: str = "",
    ) -> Callable[[F], F]:
        """Returns a decorator of a function `read(folder)` that returns the training set and the test set.

        Each of the two is a pair: images, a uint8 tensor or array of shape (n, C, H, W), and labels, n whole numbers
        from 0 to `classes - 1`.

        Args:
            name: what a recipe calls it, in `data.name`.
            classes: number of classes.
            shape: of one image, (channels, height, width).
            description: a line for `granet ls data`; by default the first of the function's docstring.
            mean: of the training images' pixels in [0, 1], for each channel; computed by default.
            std: their standard deviation, for each channel; computed by default.
            find: returns the folder that `read` is called with, given the data folder (`data.root` of the recipe, else
                the environment's `GRANET_DATA`, else `./data`), or None if the data are not there. By default it is
                the data folder itself.
            advice: what to do when they are not there; `{root}` stands for the data folder.
        """

        def decorate(read: F) -> F:
            about = description or _first_line(read)
            DATASETS.add(name, defined_by=read)(Source(about, classes, tuple(shape), mean, std, find, read, advice))
            return read

        return decorate

    def optimizer(self, name: str, *, description: str | None = None) -> Callable[[F], F]:
        """Returns a decorator of a function `build(groups, settings)` that returns a `torch.optim.Optimizer`.

        `groups` are parameter groups, in which `weight_decay` is set; `settings` is the section `train` of the recipe,
        whose `lr` and `momentum` the function uses as it sees fit. The trainer sets `lr` of all groups at each step.

        Args:
            name: what a recipe calls it, in `train.optimizer`.
            description: a line for `granet ls optimizers`; by default the first of the function's docstring.
        """

        def decorate(build: F) -> F:
            OPTIMIZERS.add(name, defined_by=build)(OptimizerKind(description or _first_line(build), build))
            return build

        return decorate

    def recipe(self, path: str | Path) -> None:
        """Registers a recipe file under its name without `.yaml`.

        Args:
            path: the file; `Path(__file__).parent / "mine.yaml"` is one beside the module that registers it.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = Path(path).absolute()
        if path.suffix != ".yaml" or not path.is_file():
            raise FileNotFoundError(f"there is no recipe file {path}; its name must end in .yaml")
        RECIPES.add(path.stem)(path)


def _first_line(function: Callable) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


register = Register()
