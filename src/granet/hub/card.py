"""Model cards: what a network is, how well it does, what it costs, and how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor

from granet.storage.codec import count_nonzero
from granet.text import markdown_table, printable, si
from granet.train.run import Run

DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "fashion-mnist": "fashion_mnist", "imagenet": "imagenet-1k"}


def of_run(run: Run, summary: Mapping[str, Any], score: Mapping[str, Any], size: Sequence[int]) -> str:
    """Returns the card of a run's network, in Markdown.

    Args:
        run: the run.
        summary: its `summary.json`.
        score: the entry of the summary for the checkpoint that is shared.
        size: channels, height and width of an image.
    """
    model, data, method = (printable(str(summary[key])) for key in ("model", "data", "method"))
    flops, parameters = summary["flops"], summary["parameters"]
    accuracy, steps = score["test_accuracy"], f"{summary['steps']:,}"
    best, images = score == summary["best"], summary.get("evaluate_images")
    some = f" ({images} images at most)" if images else ""
    chosen = "chosen on the validation images" if best else "the last one; no network was chosen"
    rows = [
        ["", "this network", "dense", "share"],
        _compared("active weights", parameters["active"], parameters["total"]),
        _compared("FLOPs of one image", flops["inference"], flops["inference_dense"]),
        _compared("FLOPs of the training", flops["training"], flops["training_dense"]),
    ]
    settings = yaml.safe_dump(_settings(run), sort_keys=False, default_flow_style=False).strip()
    shape = "x".join(map(str, size))
    parts = [
        _front_matter(data, accuracy, f"{model} on {data}, {summary['sparsity']:.0%} sparse"),
        f"# {model} on {data}, {summary['sparsity']:.0%} sparse",
        "An image classifier, trained sparse by [granet](https://pypi.org/project/granet/) with the method "
        f"`{method}`: {summary['sparsity']:.2%} of the weights in its sparse layers are zero.",
        "## Accuracy",
        markdown_table(
            [
                ["images", "accuracy"],
                [f"test set of {data}{some}", f"{accuracy:.2%}"],
                [f"validation images{some}, held out of the training set", f"{score['validation_accuracy']:.2%}"],
            ],
            right=[1],
        ),
        f"It is the network of step {score['step']:,} of {steps}, seed {summary['seed']}, {chosen}.",
        "## Size and cost",
        markdown_table(rows, right=[1, 2, 3]),
        "FLOPs are those that the zeros leave. Dense kernels multiply by zeros as well.",
        "## How to load it",
        "```python\nimport granet\n"
        'model = granet.hub.Network.from_pretrained("user/name")  # or a folder\n'
        f"scores = model(images)  # of shape (n, {shape.replace('x', ', ')}), values from 0 to 1\n```",
        'It needs `pip install "granet[hub]"`. `granet.compile(model, images)` makes it faster on a CPU where the '
        "zeros pay. `model.network` is the plain torch module.",
        "## Method and settings",
        f"Pattern of the masks: {printable(str(summary['pattern']))}. To train it again: `granet train recipe.yaml`, "
        "with the file of this repository. Settings that are not the defaults:",
        f"```yaml\n{settings}\n```",
        "## Layers",
        _layers((layer["name"], layer["shape"], layer["active"]) for layer in summary["layers"]),
        "## Limits",
        f"It knows the classes of {data} and images like those. Pruning can cost some classes more than others; "
        "`summary.json` has the test accuracy of each class.",
    ]
    return "\n\n".join(parts) + "\n"


def written(name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any], load_lines: Sequence[str]) -> str:
    """Returns the card of a model of which only the weights are known, in Markdown.

    Args:
        name: the model's name.
        tensors: its state dict.
        about: what is known of its sparsity, see `granet.storage.contents.about`.
        load_lines: the lines of Python that load it.
    """
    sparsity = about["sparsity"]
    share = "" if sparsity is None else f", {sparsity:.0%} sparse"
    facts = [f"- {key}: `{printable(str(value))}`" for key, value in about.items() if value is not None]
    matrices = {n: t for n, t in tensors.items() if t.ndim > 1}
    parts = [
        _front_matter(None, None, name),
        f"# {name}{share}",
        "A sparse network, saved by [granet](https://pypi.org/project/granet/). Its zeros are left out of the file.",
        "\n".join(facts),
        "## How to load it",
        "```python\n" + "\n".join(load_lines) + "\n```",
        'It needs `pip install "granet[hub]"`.',
        "## Layers",
        _layers((n, tuple(t.shape), count_nonzero(t)) for n, t in matrices.items()),
        "## Data and accuracy",
        "Not stated: the weights do not tell. Please add what it was trained on, and its accuracy on which split.",
    ]
    return "\n\n".join(parts) + "\n"


def _compared(what: str, mine: float, dense: float) -> list[str]:
    return [what, si(mine).strip(), si(dense).strip(), f"{mine / dense:.1%}" if dense else "-"]


def _layers(layers: Any) -> str:
    rows = [["layer", "shape", "active", "density"]]
    for name, shape, active in layers:
        total = max(1, math.prod(shape))
        rows.append([printable(name), "x".join(map(str, shape)), f"{active:,}", f"{active / total:.1%}"])
    return markdown_table(rows, right=[2, 3])


def _settings(run: Run) -> dict[str, Any]:
    values = run.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name": True, "data": {"root"}})
    return values | {"method": {"name": run.recipe.method.name} | values["method"]}


def _front_matter(data: str | None, accuracy: float | None, name: str) -> str:
    """Returns the metadata that the Hub reads."""
    values: dict[str, Any] = {"library_name": "granet", "tags": ["sparse", "pruning", "granet", "model_hub_mixin"]}
    if data is not None:
        known = DATASETS.get(data)
        values |= {"pipeline_tag": "image-classification"} | ({"datasets": [known]} if known else {})
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": known or data, "split": "test"},
            "metrics": [{"type": "accuracy", "value": accuracy}],
        }
        values["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False).strip()}\n---"
