"""Networks of transformers (Hugging Face) and peft, built small from their configurations, taken as they come."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_case import Case, ids, numbers

N_TOKENS, LENGTH = 50, 9
_NEEDS = ("transformers",)
_BERT = {"vocab_size": N_TOKENS, "num_labels": 3}
_GPT2 = {
    "vocab_size": N_TOKENS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def text(rows: int) -> dict[str, torch.Tensor]:
    """What a tokenizer returns for texts of several lengths."""
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    mask[1::2, 6:] = 0
    return {"input_ids": ids(LENGTH, N_TOKENS)(rows), "attention_mask": mask}


def two_texts(rows: int) -> dict[str, torch.Tensor]:
    """A text, and the text that a model of sequences continues."""
    return {**text(rows), "decoder_input_ids": ids(5, N_TOKENS)(rows)}


def sound(rows: int) -> dict[str, torch.Tensor]:
    """What Whisper's processor returns, shorter, and the text that it continues."""
    return {"input_features": torch.randn(rows, 8, 32), "decoder_input_ids": ids(5, N_TOKENS)(rows)}


def model(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds a model class of transformers with its configuration class."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**settings))

    return make


_LLAMA = {
    "vocab_size": N_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
}


def llama_lora() -> nn.Module:
    """A Llama with adapters that drop."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model("LlamaForCausalLM", "LlamaConfig", **_LLAMA)(), adapters)


logits = lambda output: output.logits

CASES = {
    "BERT": Case(
        model(
            "BertForSequenceClassification",
            "BertConfig",
            **_BERT,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        ),
        text,
        needs=_NEEDS,
        read=logits,
    ),
    "DistilBERT": Case(
        model(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **_BERT,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
        ),
        text,
        needs=_NEEDS,
        read=logits,
    ),
    "GPT-2": Case(
        model("GPT2LMHeadModel", "GPT2Config", **_GPT2),
        text,
        needs=_NEEDS,
        read=logits,
    ),
    "Llama": Case(model("LlamaForCausalLM", "LlamaConfig", **_LLAMA), text, needs=_NEEDS, read=logits),
    "Llama, LoRA": Case(llama_lora, text, needs=(*_NEEDS, "peft"), read=logits),
    "T5": Case(
        model(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=N_TOKENS,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
        ),
        two_texts,
        needs=_NEEDS,
        read=logits,
    ),
    "ViT": Case(
        model(
            "ViTForImageClassification",
            "ViTConfig",
            image_size=32,
            patch_size=16,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.1,
            num_labels=3,
        ),
        numbers(3, 32, 32),
        needs=_NEEDS,
        read=logits,
    ),
    "Whisper": Case(
        model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=N_TOKENS,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=16,
            max_target_positions=8,
            pad_token_id=0,
            dropout=0.1,
        ),
        sound,
        needs=_NEEDS,
        read=logits,
    ),
    "Wav2Vec2": Case(
        model(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_labels=3,
            classifier_proj_size=8,
            layerdrop=0.1,
            mask_time_prob=0.0,
        ),
        numbers(200),
        needs=_NEEDS,
        read=logits,
    ),
    "PatchTST": Case(
        model(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            prediction_length=3,
            d_model=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            head_dropout=0.1,
        ),
        numbers(16, 2),
        "numbers",
        needs=_NEEDS,
        read=lambda output: output.prediction_outputs,
        output="prediction_outputs",
    ),
}
