import copy

import pytest
import torch
from torch import nn

import granet
from granet.pruning import OWL, Magnitude, SparseGPT, Wanda
from granet.pruning.perplexity import perplexity

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
METHODS = ["magnitude", "wanda", "sparsegpt"]


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


IMAGES = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def outlier_features(model):
    """Makes some features of a Llama 50 times as large, as large language models have them; it computes the same."""
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            readers = {
                block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, layers in readers.items():
                norm.weight[::6] *= 50
                for layer in layers:
                    layer.weight[:, ::6] /= 50
    return model


def test_wanda_and_sparsegpt_lose_less_than_magnitude_where_features_differ_in_size(trained, calibration, held_out):
    dense = perplexity(trained, held_out)
    same = perplexity(outlier_features(copy.deepcopy(trained)), held_out)
    assert same == pytest.approx(dense, rel=1e-4)
    lost = {}
    for method in METHODS:
        model = outlier_features(copy.deepcopy(trained))
        report = granet.prune(model, 0.5, method, calibration)
        assert report.active == report.total // 2
        lost[method] = perplexity(model, held_out) - dense
    assert lost["magnitude"] > 2 * max(lost["wanda"], lost["sparsegpt"]) > 0


def test_each_method_reconstructs_better_than_the_one_before(trained, calibration):
    errors = {}
    for method in METHODS:
        report = granet.prune(copy.deepcopy(trained), 0.5, method, calibration)
        errors[method] = sum(layer.error for layer in report.layers)
    assert errors["magnitude"] > 1.1 * errors["wanda"] > 1.1 * 1.5 * errors["sparsegpt"]


def test_wanda_does_not_see_that_features_were_scaled(trained, calibration):
    models = copy.deepcopy(trained), outlier_features(copy.deepcopy(trained))
    for model in models:
        granet.prune(model, 0.5, "wanda", calibration)
    theirs = dict(models[1].named_parameters())
    for name, p in models[0].named_parameters():
        assert ((p != 0) != (theirs[name] != 0)).float().mean() < 0.001, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_patterns_lie_along_the_inputs(make, calibration, method, pattern, kind):
    model = make(kind)
    report = granet.prune(model, method=method, calibration=calibration[:4], pattern=pattern)
    assert 2 * report.active == report.total and f"pattern {pattern}" in str(report)
    obeyed = granet.pattern.parse(pattern)
    for layer in report.layers:
        weight = model.get_parameter(layer.name)
        assert obeyed.obeyed((weight.t() if kind == "gpt2" else weight) != 0)


def test_a_pattern_of_a_convolution_is_the_librarys(tmp_path):
    model = cnn()
    granet.prune(model, method="sparsegpt", calibration=IMAGES, pattern="2:4")
    sparsifier = granet.Sparsifier(model, granet.Fixed(), pattern="2:4")
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budgets", ["uniform", "erk", "3.*=0.2, *=0.6", OWL(outlier=2.0, spread=0.05)])
def test_counts_of_a_network_of_convolutions_are_exact(method, budgets):
    model = cnn()
    report = granet.prune(model, 0.7, method, IMAGES, budgets=budgets)
    sizes = {"0.weight": 288, "3.weight": 1152, "6.weight": 1440}
    assert [layer.name for layer in report.layers] == list(sizes)
    assert report.total == 2880 and report.active == 864
    assert all(layer.active == int(model.get_parameter(layer.name).count_nonzero()) for layer in report.layers)
    if isinstance(budgets, str):
        shapes = {name: tuple(model.get_parameter(name).shape) for name in sizes}
        expected = granet.distribution.named(budgets)(shapes, 0.3)
        assert {layer.name: layer.active for layer in report.layers} == expected
    assert report.dense == sum(p.numel() for p in model.parameters()) - 2880


@pytest.mark.parametrize("method", METHODS)
def test_pruning_repeats_to_the_bit(method):
    models = [cnn(), cnn()]
    for model in models:
        granet.prune(model, 0.6, method, IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_magnitude_needs_no_calibration_and_takes_what_inputs_are_not_observed_of():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"rnn": nn.GRU(8, 8), "depthwise": nn.Conv2d(8, 8, 3, groups=8), "up": nn.ConvTranspose1d(4, 4, 3)}
    )
    before = copy.deepcopy(model)
    report = granet.prune(model, 0.75, "magnitude")
    assert len(report.layers) == 4 and report.sparsity == pytest.approx(0.75, abs=1e-3)
    assert all(layer.error is None for layer in report.layers) and "error" not in str(report)
    for layer in report.layers:
        weight, old = model.get_parameter(layer.name), before.get_parameter(layer.name)
        kept = weight != 0
        assert torch.equal(weight[kept], old[kept]) and old[kept].abs().min() > old[~kept].abs().max()


def test_the_report_is_a_table_that_lines_up():
    report = granet.prune(cnn(), 0.7, SparseGPT(dampening=0.1), IMAGES)
    first, _, *lines = str(report).splitlines()
    assert first == "SparseGPT(dampening=0.1, columns=128)"
    assert lines[0].split() == ["layer", "shape", "weights", "active", "density", "error"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[-2].split() == ["pruned", "layers", "2,880", "864", "30.0%"]
    assert 0 < report.layers[0].error < 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_keeps_the_zeros(make, calibration, kind):
    model = make(kind)
    report = granet.prune(model, 0.6, "sparsegpt", calibration[:8])
    only = None if kind == "llama" else [layer.name for layer in report.layers]
    sparsifier = granet.Sparsifier(model, granet.Fixed(), only=only, skip="lm_head" if kind == "llama" else ())
    assert sparsifier.active == report.active and sparsifier.total == report.total
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer)
    losses = []
    for _ in range(2):
        for ids in calibration[:8]:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[8:]) < sum(losses[:8])
    for name, mask in masks.items():
        assert torch.equal(sparsifier.masks[name], mask) and not model.get_parameter(name)[~mask].any()
    with pytest.raises(ValueError, match=r"keeps this model sparse: call its detach\(\) first"):
        granet.prune(model, 0.7, "magnitude")


def test_a_pruned_model_is_saved_small(make, calibration, tmp_path):
    model = make("llama")
    granet.prune(model, 0.8, "wanda", calibration[:4])
    granet.save(model, tmp_path / "small.safetensors")
    other = granet.load(tmp_path / "small.safetensors", into=make("llama"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    granet.hub.save_transformers(model, tmp_path / "small")
    other = granet.hub.load_transformers(tmp_path / "small")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_embeddings_and_the_output_layer_stay_dense(make, calibration):
    for tied in (False, True):
        model = make("llama", tie_word_embeddings=tied)
        report = granet.prune(model, 0.5, "magnitude")
        assert len(report.layers) == 21 and model.lm_head.weight.all() and model.model.embed_tokens.weight.all()
    report = granet.prune(make("llama"), 0.5, "wanda", calibration[:2], only=["linear"], skip="*.mlp.*")
    assert [layer.name for layer in report.layers][-1] == "lm_head.weight" and len(report.layers) == 13


def test_bfloat16_is_pruned_in_float32_and_stays_bfloat16(make, calibration):
    model = make("llama").to(torch.bfloat16)
    report = granet.prune(model, 0.5, "sparsegpt", calibration[:8])
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert 2 * report.active == report.total and all(0 < layer.error < 0.5 for layer in report.layers)


def test_a_layer_that_nothing_reaches_is_pruned_by_magnitude_with_a_warning():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    before = model["idle"].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match=r"no calibration data reached 'idle.weight'"):
        report = granet.prune(model, 0.5, "sparsegpt", torch.randn(32, 8))
    weight = model["idle"].weight
    assert torch.equal(weight[weight != 0], before[weight != 0]) and weight.count_nonzero() == 32
    assert report.layers[1].error is None and report.layers[1].tokens == 0


def test_inputs_that_overflow_are_refused_by_name():
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    model.forward = lambda x: model["layer"](x)
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of 'layer.weight' are NaN or infinite"):
        granet.prune(model, 0.5, "wanda", x)


MLP = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)]
X = torch.randn(16, 6)
REFUSED = [
    (ValueError, "unknown method 'wando': choose from .*; did you mean 'wanda'", (0.5, "wando", X), {}),
    (TypeError, "the method is the class Wanda: give one of", (0.5, Wanda, X), {}),
    (TypeError, "methods that train, such as granet.GMP, go to", (0.5, granet.Static(sparsity=0.5), X), {}),
    (ValueError, "Wanda looks at activations: give calibration=", (0.5, "wanda"), {}),
    (ValueError, "OWL looks at activations: give calibration=", (0.5, "magnitude"), {"budgets": "owl"}),
    (TypeError, "sparsity is None: give a number", (), {"method": "magnitude"}),
    (TypeError, "sparsity is the text '0.5'", ("0.5", "magnitude"), {}),
    (ValueError, "sparsity=1.0: give a number above 0 and below 1", (1.0, "magnitude"), {}),
    (ValueError, "unknown budgets 'owls'.*did you mean 'owl'", (0.5, "magnitude"), {"budgets": "owls"}),
    (TypeError, "budgets= is 3", (0.5, "magnitude"), {"budgets": 3}),
    (ValueError, "pattern 2:4 has a sparsity of 0.5: leave sparsity=0.6 out", (0.6, "magnitude"), {"pattern": "2:4"}),
    (ValueError, "same density: leave budgets=.* out", (0.5, "wanda", X), {"pattern": "2:4", "budgets": "owl"}),
    (ValueError, "pattern 4x1 is not for one-shot pruning", (0.5, "magnitude"), {"pattern": "4x1"}),
    (ValueError, "'0.weight' of .* cannot obey pattern 2:4: its 6 inputs", (0.5, "magnitude"), {"pattern": "2:4"}),
    (ValueError, "skip='fc' matches no parameter", (0.5, "magnitude"), {"skip": "fc"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "args", "options"), REFUSED)
def test_what_is_refused(kind, message, args, options):
    model = nn.Sequential(*copy.deepcopy(MLP))
    before = copy.deepcopy(model)
    with pytest.raises(kind, match=message):
        granet.prune(model, *args, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "'weight' is of a convolution with 2 groups"),
        (nn.Conv1d(8, 8, 3), "'weight' is of a Conv1d, and inputs are observed of"),
        (nn.Linear(8, 8, device="meta"), "'weight' is on the meta device"),
        (nn.LayerNorm(8), "no parameter of LayerNorm is sparse"),
        (torch.zeros(3), "the model is a Tensor"),
    ],
)
def test_layers_that_cannot_be_pruned(module, message):
    with pytest.raises((ValueError, TypeError), match=message):
        granet.prune(module, 0.5, "wanda", torch.randn(4, 8))


def test_weights_that_are_nan_are_refused_before_anything_is_pruned():
    model = cnn()
    with torch.no_grad():
        model[6].weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'6.weight' has weights that are NaN or infinite"):
        granet.prune(model, 0.5, Magnitude())
    assert model[0].weight.all()
