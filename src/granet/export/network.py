"""The network that is exported: a copy in evaluation mode on the CPU, in float32, and its example inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from granet.functional import copied
from granet.names import described
from granet.sparsifier.reparameterize import fold


class ExportError(ValueError):
    """A model that cannot be exported, or a file that does not compute what the model computes."""


class Network:
    """A model prepared for an export; the model itself is left as it is.

    Args:
        model: any module whose inputs are tensors.
        example: a tensor, or a tuple of the positional arguments; the first axis is the batch.

    Raises:
        ValueError: the example is something else, or the weights hold NaN or infinite values.
    """

    def __init__(self, model: nn.Module, example: Tensor | tuple[Tensor, ...]):
        if not isinstance(model, nn.Module):
            raise ValueError(f"a torch.nn.Module can be exported, not {described(model)}")
        inputs = example if isinstance(example, tuple) else (example,)
        if not inputs or not all(isinstance(one, Tensor) and one.dim() and len(one) for one in inputs):
            raise ValueError(f"the example is {described(example)}: give a tensor or a tuple of tensors with a batch")
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values: nothing can be exported")
        self.model = copied(model).cpu().float().eval().requires_grad_(False)
        fold(self.model)  # the weights that a reparameterised model computes with
        self.example = tuple(_plain(one) for one in inputs)

    def __call__(self, arguments: tuple[Tensor, ...]) -> object:
        """Returns what the model computes."""
        with torch.no_grad():
            return self.model(*arguments)

    def arguments(self, batch: object) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Returns the arguments in a batch as float32 or whole numbers, and its labels if they follow.

        Raises:
            ValueError: the batch does not have the example's shapes.
        """
        given = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        used, rest = given[: len(self.example)], given[len(self.example) :]
        if len(used) < len(self.example) or not all(isinstance(one, Tensor) for one in used):
            raise ValueError(f"a batch is {described(batch)}, and the model takes {len(self.example)} tensors")
        used = tuple(_plain(one) for one in used)
        for one, example in zip(used, self.example, strict=True):
            if one.shape[1:] != example.shape[1:] or one.dtype != example.dtype:
                raise ValueError(
                    f"a batch holds {_shape(one)}, and the example inputs have {_shape(example)} there: only the first "
                    "axis may differ"
                )
        labels = next(iter(rest), None)
        is_labels = isinstance(labels, Tensor) and labels.shape == used[0].shape[:1] and not labels.is_floating_point()
        return used, labels.cpu() if is_labels else None

    def program(self, *, any_batch: bool = True) -> torch.export.ExportedProgram:
        """Returns what `torch.export` makes of the model, for any number of examples or for those of the example.

        Raises:
            ExportError: torch cannot export it; the message has the cause.
        """
        example, shapes = self.example, None
        if any_batch:
            batch = torch.export.Dim("batch")
            # torch takes a size of 1 for a constant
            example = tuple(torch.cat([one, one]) if len(one) == 1 else one for one in example)
            collection = torch.export.ShapesCollection()
            for one in example:
                collection[one] = {0: batch}
            shapes = collection.dynamic_shapes(self.model, example)
        try:
            with torch.no_grad(), quiet():
                return torch.export.export(self.model, example, dynamic_shapes=shapes)
        except Exception as error:  # of many kinds
            sizes = "any batch size" if any_batch else "the example's batch size"
            cause = str(error).strip().partition("\n\n")[0]
            raise ExportError(f"torch.export cannot record the model for {sizes}: {cause}") from error


@contextmanager
def converting(what: str) -> Iterator[None]:
    """Turns the errors of a converter, which are of many kinds, into one.

    Raises:
        ExportError: there was one; the message has the first line that says what is missing.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{what} cannot convert the model: {str(cause).strip().partition(chr(10))[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what exporters warn of: deprecations in one another."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _shape(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} of {str(tensor.dtype).removeprefix('torch.')}"
