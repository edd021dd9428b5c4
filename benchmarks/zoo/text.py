"""Networks of tokens: an encoder of the size of MiniLM, and a causal language model with LoRA."""

import torch
from torch import Tensor, nn

from vbdl import Categorical

from . import Network, ids


class Encoder(nn.Module):
    """An encoder of the size of MiniLM-L12 that classifies: 12 layers of width 384, 12 heads."""

    def __init__(self, n_tokens: int = 30522, length: int = 128, width: int = 384, depth: int = 12, p: float = 0.1):
        super().__init__()
        self.embed, self.place = nn.Embedding(n_tokens, width), nn.Embedding(length, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(p)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, p, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.norm(self.embed(tokens) + self.place(places)))
        return self.head(self.layers(x).mean(1))


class NextToken(nn.Module):
    """The logits of the token after the last, of a causal language model of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits[:, -1]


def llama_lora() -> nn.Module:
    """A small Llama, its weights the same in every member, with LoRA of its own for each (peft)."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=8000, max_position_embeddings=128, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return NextToken(get_peft_model(base, lora))


NETWORKS = [
    Network(
        "minilm-128",
        "encoder of MiniLM's size, 128 tokens",
        Encoder,
        ids(128, 30522),
        Categorical,
        ("ensemble", "dropout"),
    ),
    Network(
        "llama-lora",
        "Llama, 6 layers of 256, LoRA, 64 tokens",
        llama_lora,
        ids(64, 8000),
        Categorical,
        ("ensemble", "dropout"),
    ),
]
