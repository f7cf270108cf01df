"""Text for the language models of these examples: files of Python's standard library, which every machine has."""

import sysconfig
from pathlib import Path

import torch

FILES = ("argparse.py", "ast.py", "datetime.py", "decimal.py", "difflib.py", "inspect.py", "logging/__init__.py")


def characters(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training text and validation text as whole numbers (one for each character), and the number of characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text(encoding="utf-8") for name in FILES if (path := folder / name).exists())
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([index[character] for character in text], device=device)
    split = int(0.9 * len(codes))
    return codes[:split], codes[split:], len(alphabet)


def batch(codes: torch.Tensor, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pieces of the text of shape (size, length), and the same pieces one character later."""
    starts = torch.randint(len(codes) - length - 1, (size,))
    pieces = torch.stack([codes[start : start + length + 1] for start in starts.tolist()])
    return pieces[:, :-1], pieces[:, 1:]
