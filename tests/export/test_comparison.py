import re

import pytest
import torch

from granet.export import Export, ExportError
from granet.export.comparison import bound_of, compare
from granet.export.network import Network


def runner(network, change=lambda outputs: outputs):
    return lambda arguments: [change(network(arguments))]


def test_the_largest_deviation_is_a_share_of_the_largest_output(model, x):
    network = Network(model, x)
    outputs = network((x,))

    def changed(outputs):
        outputs = outputs.clone()
        outputs[0, 1] += 0.5
        return outputs

    found = compare(network, runner(network, changed), [x, x[:2]], bound=100)
    assert found.examples == 6
    assert found.deviation == pytest.approx(0.5 / outputs.abs().max().item())
    assert compare(network, runner(network), None, bound=1e-9).examples == 5  # the example, and its first entry


def test_labels_give_the_accuracy_of_both(model, x):
    network = Network(model, x)
    labels = network((x,)).argmax(dim=1)
    wrong = torch.where(torch.arange(4) == 0, (labels + 1) % 5, labels)
    found = compare(network, runner(network, lambda outputs: outputs.roll(1, dims=1)), [(x, wrong)], bound=100)
    assert found.accuracy == (0.75, 0.25)
    assert compare(network, runner(network), [(x, torch.rand(4))], bound=1).accuracy is None  # these are no labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: outputs + 1, "deviate from the model's by .* on 4 inputs, and 0.01 is allowed"),
        (lambda outputs: outputs * float("nan"), "hold NaN"),
        (lambda outputs: outputs + float("inf"), "deviate"),
        (lambda outputs: outputs[:, :2], re.escape("shapes [(4, 2)], those of the model [(4, 5)]")),
    ],
)
def test_what_deviates_is_an_error(model, x, change, message):
    network = Network(model, x)
    with pytest.raises(ExportError, match=message):
        compare(network, runner(network, change), [x], bound=0.01)


def test_outputs_of_the_model_that_are_not_finite_are_an_error(model, x):
    network = Network(model, x)
    with pytest.raises(ExportError, match="the model's own outputs"):
        compare(network, runner(network), [torch.full_like(x, float("inf"))], bound=1)


def test_nothing_to_compare_is_an_error(model, x):
    network = Network(model, x)
    with pytest.raises(ValueError, match="at least one batch"):
        compare(network, runner(network), [], bound=1)


def test_bounds():
    assert (bound_of("float32", None), bound_of("int8", 0.5)) == (1e-4, 0.5)
    with pytest.raises(ValueError, match="'int4' is not possible; 'float32' and 'int8' are"):
        bound_of("int4", None)
    for tolerance in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            bound_of("float32", tolerance)


def test_an_export_without_a_comparison_says_why(tmp_path):
    export = Export(tmp_path / "x", "coreml", "float32", 1000, 0.1, None, "it was not run")
    assert export.deviation is None
    assert str(export).splitlines()[1:] == ["it was not run"]
