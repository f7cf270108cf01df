import argparse
from pathlib import Path

import pytest
import torch

import granet

transformers = pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')

from transformers.pytorch_utils import Conv1D  # noqa: E402  after the skip

STEPS = 12


@pytest.fixture(scope="module")
def text():
    """Bytes of a file that every Python has: batches of 4 x 32 tokens."""
    ids = torch.tensor(list(Path(argparse.__file__).read_bytes()[: STEPS * 4 * 32]))
    return ids.view(STEPS, 4, 32)


def gpt2():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def llama():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    config = transformers.LlamaConfig(**sizes, intermediate_size=64, vocab_size=256, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def train(model, sparsifier, batches, lr=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    sparsifier.attach(optimizer)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in sparsifier.masks.items():
        weight = dict(model.named_parameters())[name]
        assert not weight[~mask].any()
    assert sum(losses[-4:]) < sum(losses[:4])


def tokens(text):
    return [{"input_ids": ids, "labels": ids} for ids in text]


def test_gpt2s_transposed_layers_can_be_chosen(text):
    torch.manual_seed(0)
    model = gpt2()
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=12, interval=3), only=Conv1D)
    leaves = {name.split(".", 3)[-1] for name in sparsifier.masks}
    assert leaves == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    train(model, sparsifier, tokens(text))
    assert sparsifier.version == 3 and sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match="no parameter of GPT2LMHeadModel is sparse"):
        granet.Sparsifier(gpt2(), granet.Static(sparsity=0.5))  # no layer of a kind that is known by itself


def test_tied_embeddings_stay_tied_and_dense(text):
    torch.manual_seed(0)
    model = llama()
    sparsifier = granet.Sparsifier(model, granet.GMP(sparsity=0.8, end=9, interval=3))
    assert len(sparsifier.masks) == 2 * (4 + 3)  # attention's projections and the MLP's, of two layers
    train(model, sparsifier, tokens(text))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.all()


def test_a_tied_embedding_is_sparse_under_both_names_where_asked(text):
    torch.manual_seed(0)
    model = gpt2()
    sparsifier = granet.Sparsifier(model, granet.GMP(sparsity=0.5, end=9, interval=3), only=["embedding", Conv1D])
    train(model, sparsifier, tokens(text))
    mask = sparsifier.masks["transformer.wte.weight"]
    assert "lm_head.weight" not in sparsifier.masks and not mask.all()
    assert model.lm_head.weight is model.transformer.wte.weight and not model.lm_head.weight[~mask].any()


def test_a_vision_transformer(problem):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    model = transformers.ViTForImageClassification(config)
    method = granet.GraNet(sparsity=0.8, initial_sparsity=0.3, end=9, total=12, interval=3)
    sparsifier = granet.Sparsifier(model, method, skip=["classifier", "*embeddings*"])
    assert len(sparsifier.masks) == 2 * 6
    train(model, sparsifier, [{"pixel_values": x.view(-1, 1, 8, 8), "labels": y} for x, y in problem.loader()][:12])
    assert sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)


def test_gradients_of_bfloat16_weights_are_gathered_in_float32(text):
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=14, interval=4, accumulate=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer)
    expected = {}
    for step, inputs in enumerate(tokens(text)[:3], 1):
        model(**inputs).loss.backward()
        for name, p in model.named_parameters():
            if name in sparsifier.masks and step > 1:  # the three steps up to the update at step 4
                expected[name] = expected.get(name, 0) + p.grad.float() / 3
        optimizer.step()
        optimizer.zero_grad()
    kept = sparsifier.state_dict()["gradients"]
    assert set(kept) == set(sparsifier.masks)
    for name, scores in kept.items():
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected[name])
    model(**tokens(text)[3]).loss.backward()
    optimizer.step()
    assert sparsifier.version == 1
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_fine_tuning_keeps_a_pruned_models_zeros(text, tmp_path):
    pytest.importorskip("accelerate", reason='needs pip install "granet[huggingface]"')
    from granet.integrations.huggingface import SparseTraining

    torch.manual_seed(0)
    granet.Sparsifier(pruned := llama(), granet.Static(sparsity=0.7))
    pruned.save_pretrained(tmp_path / "pruned")  # no masks: the zeros say what is inactive

    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "pruned")
    sparsifier = granet.Sparsifier(model, granet.Fixed())
    assert sparsifier.sparsity == pytest.approx(0.7, abs=1e-3)
    zeros = {name: dict(model.named_parameters())[name] == 0 for name in sparsifier.masks}
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in text.view(-1, 32)]
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[SparseTraining(sparsifier)]).train()
    for name, p in model.named_parameters():
        if name in zeros:
            assert not p[zeros[name]].any() and p[~zeros[name]].all()


def test_merging_lora_keeps_the_mask(text):
    peft = pytest.importorskip("peft", reason='needs pip install "granet[peft]"')
    torch.manual_seed(0)
    model = llama()
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.7))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for inputs in tokens(text)[:8]:
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    weights = dict(merged.named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights[name].all()  # the merge fills the zeros
    again = granet.Sparsifier(merged, granet.Fixed(), masks=sparsifier.masks)
    for name, mask in sparsifier.masks.items():
        assert not weights[name][~mask].any() and weights[name][mask].all()
    train(merged.requires_grad_(), again, tokens(text)[:8])  # and they stay, in further fine-tuning
