"""Text of a file as calibration data and as held-out data, and the perplexity of a language model on it."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granet.pruning.stream import quiet

HELD_OUT = 0.1  # the last part of the text, on which perplexity is measured


def pieces(ids: Tensor, length: int, most: int) -> list[Tensor]:
    """Returns pieces of a text, of shape (1, length), spread evenly over it: as many as there are, at most `most`.

    Args:
        ids: the tokens of the text.
        length: of each piece.
        most: how many at most.

    >>> [piece.tolist() for piece in pieces(torch.arange(10), 3, 2)]
    [[[0, 1, 2]], [[3, 4, 5]]]
    """
    whole = ids[: len(ids) // length * length].view(-1, 1, length)
    most = min(most, len(whole))
    return [whole[i * len(whole) // most] for i in range(most)]


def split(ids: Tensor, length: int, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns pieces for calibration, and others of the held-out end of the text.

    Raises:
        ValueError: the text is too short for a piece of each.
    """
    cut = len(ids) - max(length, int(len(ids) * HELD_OUT))
    if cut < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, and at least {2 * length} are needed for a piece of {length} tokens to "
            "calibrate on and one to measure on: give a longer text, or shorter pieces"
        )
    return pieces(ids[:cut], length, most), pieces(ids[cut:], length, most)


def tokens(tokenizer: Any, text: str) -> Tensor:
    """Returns the tokens of a text, without special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def perplexity(model: nn.Module, texts: Sequence[Tensor]) -> float:
    """Returns the perplexity of a causal language model: `exp` of the mean loss of each token that follows another.

    Args:
        model: called on token ids of shape (batch, length), it returns logits, or something that has them as `logits`.
        texts: such ids; each piece is looked at by itself.
    """
    loss, count = 0.0, 0
    device = next(model.parameters()).device
    with quiet(model):
        for ids in texts:
            ids = ids.to(device)
            output = model(ids)
            logits = getattr(output, "logits", output)[:, :-1].flatten(0, 1).float()
            loss += float(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return exp(min(loss / count, 700.0)) if loss == loss else float("nan")
