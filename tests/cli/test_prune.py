"""`granet prune` on a small Llama that reads bytes."""

import re
import sys
from pydoc_data import topics

import pytest
import torch

import granet

transformers = pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model and its tokenizer, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("made")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder / "tiny")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 256, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("\n".join(topics.topics[key] for key in sorted(topics.topics))[:40_000])
    return folder


def zeros_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sparsifier = granet.Sparsifier(model, granet.Fixed(), skip="lm_head")
    return sparsifier.total - sparsifier.active, sparsifier.total


def test_wanda(say, made, tmp_path):
    code, out, err = say("prune", made / "tiny", "--calibration", made / "text.txt", "--sparsity", "0.6")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "Wanda()" and "model.layers.1.mlp.down_proj.weight" in out
    assert re.search(r"calibrated on 128 pieces of 64 tokens of .*text\.txt", out)
    found = re.search(r"perplexity on 62 pieces of its last tenth: ([\d.]+) dense, ([\d.]+) pruned", out)
    assert all(200 < float(number) < 350 for number in found.groups())
    assert lines[-1] == "written: tiny-wanda-0.6"
    folder = tmp_path / "tiny-wanda-0.6"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {path.name for path in (made / "tiny").iterdir()}
    zeros, total = zeros_of(folder)
    assert re.search(rf"pruned layers +{total:,} +{total - zeros:,}", out) and zeros / total == pytest.approx(
        0.6, abs=1e-4
    )
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.decode(again("def f(): pass")["input_ids"]) == "def f(): pass"
    again = ["--samples", "4", "--sparsity", "0.7", "--out", "sparser"]
    assert say("prune", folder, "--calibration", made / "text.txt", *again)[0] == 0


def test_sparsegpt_under_a_pattern_in_shorter_pieces(say, made, tmp_path):
    words = ["--method", "sparsegpt", "--pattern", "2:4", "--samples", "9", "--length", "32", "--skip", "*.0.mlp.*"]
    code, out, err = say("prune", made / "tiny", "--calibration", made / "text.txt", *words, "--out", "out")
    assert code == 0, err
    assert out.startswith("SparseGPT(dampening=0.01, columns=128), pattern 2:4")
    assert "calibrated on 9 pieces of 32 tokens" in out and "layers.0.mlp" not in out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert granet.pattern.parse("2:4").obeyed(model.model.layers[1].mlp.up_proj.weight != 0)
    assert model.model.layers[0].mlp.up_proj.weight.all()


def test_magnitude_without_a_text_or_a_tokenizer(say, made, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "tiny")
    model.save_pretrained(tmp_path / "alone")
    code, out, err = say("prune", tmp_path / "alone", "--method", "magnitude")
    assert code == 0, err
    assert "perplexity" not in out and out.splitlines()[-1] == "written: alone-magnitude-0.5"
    zeros, total = zeros_of(tmp_path / "alone-magnitude-0.5")
    assert 2 * zeros == total
    code, _, err = say("prune", tmp_path / "alone", "--calibration", made / "text.txt")
    assert code == 2 and "has no tokenizer that can be loaded" in err


REFUSED = [
    ("tiny", "--method wanda with --budgets uniform looks at activations: give a text file with --calibration"),
    ("tiny --method magnitude --budgets owl", "--budgets owl looks at activations"),
    ("tiny --method wando", "--method: 'wando' is not possible"),
    ("text.txt --method magnitude", "is no folder of a transformers model, because it has no config.json"),
    ("tiny --method magnitude --out tiny", "exists already: move it away, or give another folder with --out"),
    ("tiny --method magnitude --out none/such", "there is no folder none"),
    (
        "tiny --calibration none.txt",
        r"--calibration none.txt cannot be read \(No such file.*\): give a text",
    ),
    ("broken --method magnitude", r"the model in broken cannot be loaded \(.*header.*\): its files may be damaged"),
    ("tiny --calibration bytes", "bytes is no text in UTF-8"),
    ("tiny --calibration short", "the text has 100 tokens, and at least 128 are needed"),
    ("tiny --calibration text.txt --samples 0", "--samples needs a number from 1"),
    ("tiny --calibration text.txt --pattern 3:7", "cannot obey pattern 3:7: .* Leave it dense with --skip 'model"),
    ("tiny --calibration text.txt --sparsity 1.5", "sparsity=1.5: give a number above 0 and below 1"),
    ("tiny --calibration text.txt --device tpu9", "--device tpu9 cannot be used"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_refused_leaves_nothing_behind(say, made, tmp_path, given, message):
    (tmp_path / "tiny").symlink_to(made / "tiny")
    (tmp_path / "text.txt").symlink_to(made / "text.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").symlink_to(made / "tiny" / "config.json")
    whole = (made / "tiny" / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:1000])
    (tmp_path / "short").write_text("x" * 100)
    before = sorted(tmp_path.iterdir())
    code, out, err = say("prune", *given.split())
    assert (code, out) == (2, "") and err.startswith("granet: error: ")
    assert re.search(message, err), err
    assert sorted(tmp_path.iterdir()) == before


def test_transformers_that_is_missing_is_named(say, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = say("prune", made / "tiny", "--method", "magnitude")
    assert code == 2 and 'pip install "granet[huggingface]"' in err
