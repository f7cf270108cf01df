"""How well a network does on a split of a dataset: mean loss, and accuracy over all images and over each class."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy of a network on a split."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Best(Score):
    """The best evaluation so far, among those at target sparsity."""

    step: int


@dataclass(frozen=True)
class Evaluation(Score):
    """A score with the accuracy on the images of each class; None for a class that has no image in the split."""

    per_class: tuple[float | None, ...]


class Tally:
    """The sums that an evaluation is made of, batch by batch.

    Args:
        classes: Number of classes.
        device: Where the batches are.

    Attributes:
        sums: The loss, the images of each class, and the correctly classified images of each class: one tensor of
            shape (1 + 2 * classes,), so that ranks can add theirs up in one step.

    >>> tally = Tally(3, torch.device("cpu"))
    >>> tally.add(torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    >>> tally.evaluation().accuracy, tally.evaluation().per_class
    (0.5, (1.0, 0.0, None))
    """

    def __init__(self, classes: int, device: torch.device):
        self.sums = torch.zeros(1 + 2 * classes, dtype=torch.float64, device=device)
        self._loss, self._images, self._correct = self.sums.split([1, classes, classes])

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: `logits` of shape (N, classes), `labels` of shape (N,)."""
        hit = logits.argmax(1) == labels
        self._loss += F.cross_entropy(logits, labels, reduction="sum")
        self._images.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self._correct.index_add_(0, labels, hit.double())

    def evaluation(self) -> Evaluation:
        """Returns the means over all images that were counted."""
        (loss,), images, correct = self._loss.tolist(), self._images.tolist(), self._correct.tolist()
        per_class = (right / seen if seen else None for right, seen in zip(correct, images, strict=True))
        return Evaluation(loss / sum(images), sum(correct) / sum(images), tuple(per_class))
