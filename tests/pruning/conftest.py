import copy
import math
from pydoc_data import topics

import pytest
import torch

CONTEXT = 48


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}
KEYS = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 256}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL | KEYS),
    "gemma3": ("Gemma3ForCausalLM", SMALL | KEYS | ENDS | {"head_dim": 8, "sliding_window": 8, "layer_types": None}),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 256} | ENDS | NO_DROPOUT),
    "opt": (
        "OPTForCausalLM",
        SMALL | ENDS | {"ffn_dim": 64, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32},
    ),
    "t5": ("T5ForConditionalGeneration", T5 | ENDS | {"decoder_start_token_id": 0}),
}


def model_of(kind, **changed):
    """A small language model of transformers on bytes."""
    transformers = pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')
    torch.manual_seed(0)
    name, settings = MODELS[kind]
    made = getattr(transformers, name)
    return made(made.config_class(**(settings | changed))).eval()


@pytest.fixture(scope="session")
def make():
    return model_of


@pytest.fixture(scope="session")
def text():
    """Bytes of the language reference that comes with Python."""
    whole = "\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    return torch.tensor(list(whole))


@pytest.fixture(scope="session")
def calibration(text):
    """32 pieces of the text."""
    return [text[i * 1000 : i * 1000 + CONTEXT].view(1, -1) for i in range(32)]


@pytest.fixture(scope="session")
def held_out(text):
    """Pieces that no model has seen."""
    return [text[i : i + CONTEXT].view(1, -1) for i in range(len(text) - 50_000, len(text) - CONTEXT, 1500)]


@pytest.fixture(scope="session")
def trained(text):
    """A Llama that was trained for a few seconds; use `language_model`, which is a copy."""
    model, steps = model_of("llama", hidden_size=48, intermediate_size=96, initializer_range=0.1).train(), 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = text[torch.randint(len(text) - 60_000, (12, 1), generator=rng) + torch.arange(CONTEXT)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return model.eval()


@pytest.fixture
def language_model(trained):
    return copy.deepcopy(trained)
