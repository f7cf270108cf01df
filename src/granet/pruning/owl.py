"""OWL: layer budgets weighed by outliers (Yin et al., ICML 2024, https://arxiv.org/abs/2310.05175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor


@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers stay denser; all layers of a block are equally dense.

    Args:
        outlier: a score above so many times the mean of its block is an outlier (the paper's M).
        spread: how far a block's sparsity is from the whole model's at most (the paper's lambda).
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self):
        if not (isfinite(self.outlier) and self.outlier > 0):
            raise ValueError(f"outlier={self.outlier}: give a positive number; the default is 5")
        if not (isfinite(self.spread) and 0 <= self.spread < 0.5):
            raise ValueError(f"spread={self.spread}: give a number from 0 and below 0.5; the default is 0.08")

    def ratio(self, scores: Sequence[Tensor]) -> float:
        """The share of outliers among the scores of a block's layers: the block's part of the LOD (section 3.2)."""
        total = sum(one.numel() for one in scores)
        threshold = self.outlier * sum(one.sum(dtype=one.dtype).item() for one in scores) / total
        return sum(int((one > threshold).sum()) for one in scores) / total

    def densities(self, ratios: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
        """The density of each block: outlier ratios scaled to a range of twice the spread around `density`.

        Args:
            ratios: the outlier ratio of each block.
            sizes: the number of weights of each block.
            density: that of all blocks together.

        >>> found = OWL(spread=0.1).densities({"a": 0.03, "b": 0.01, "c": 0.02}, {"a": 9, "b": 9, "c": 9}, 0.4)
        >>> {name: round(density, 6) for name, density in found.items()}
        {'a': 0.5, 'b': 0.3, 'c': 0.4}

        Raises:
            ValueError: a block would be denser than 1, or have no weight left.
        """
        low, high = min(ratios.values()), max(ratios.values())
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        scaled = {name: scale * (ratio - low) for name, ratio in ratios.items()}
        mean = sum(scaled[name] * sizes[name] for name in sizes) / sum(sizes.values())
        found = {name: value - mean + density for name, value in scaled.items()}
        name = min(found, key=found.get) if min(found.values()) <= 0 else max(found, key=found.get)
        if not 0 < found[name] <= 1:
            raise ValueError(
                f"OWL with spread={self.spread} would give {name} a density of {found[name]:.3f} at a sparsity of "
                f"{1 - density:.4g}: use a smaller spread, OWL(spread=...)"
            )
        return found
