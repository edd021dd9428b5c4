"""Hugging Face networks as they come, untrained and tiny: dicts with integer masks in, their own outputs out."""

import copy

import pytest
import torch
from torch.func import functional_call

import vbdl

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]  # peft reads it

ROWS, CLASSES, WORDS = 8, 3, 50
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": WORDS,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=CLASSES))


def distilbert():
    config = transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=WORDS, num_labels=CLASSES
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=32, **NO_TOKENS)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.1, **NO_TOKENS)
    return transformers.LlamaForCausalLM(config)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(llama(), config)


def t5():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=WORDS)
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
    )
    return transformers.ViTForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=WORDS,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.1,
        decoder_start_token_id=3,
        **NO_TOKENS,
    )
    return transformers.WhisperForConditionalGeneration(config)


def inputs(name):
    """A batch whose mask has padding in every other row, and the same batch without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, WORDS, (ROWS, 10), generator=generator)
    mask = torch.ones(ROWS, 10, dtype=torch.int64)
    padded = mask.clone()
    padded[1::2, 6:] = 0
    if name == "vit":
        return [{"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator)}] * 2
    if name == "whisper":
        return [{"input_features": torch.randn(ROWS, 8, 20, generator=generator), "decoder_input_ids": ids[:, :5]}] * 2
    more = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
    return [transformers.BatchEncoding({"input_ids": ids, "attention_mask": m, **more}) for m in (padded, mask)]


NETWORKS = {
    "bert": bert,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama,
    "lora": lora,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
}

METHODS = {
    "MC dropout": lambda networks: vbdl.MCDropout(networks[0], p=0.1),
    "mean-field": lambda networks: vbdl.MeanField(networks[0].eval(), ROWS),
    "ensemble": lambda networks: vbdl.DeepEnsemble(networks),
}


def members(name):
    """Two networks of this kind; with adapters on the same base."""
    first = NETWORKS[name]()
    if name != "lora":
        return [first, NETWORKS[name]()]
    second = copy.deepcopy(first)
    for n, p in second.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p)
    return [first, second]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_trained_predicted_saved_and_loaded_as_a_plain_loop_would(method, name, tmp_path):
    torch.manual_seed(0)
    padded, full = inputs(name)
    networks = members(name)
    with torch.no_grad():
        shape = networks[0].eval()(**padded).logits.shape
    y = torch.randint(shape[-1], shape[:-1])
    q, likelihood = METHODS[method](networks), vbdl.Categorical()
    history = vbdl.fit(q, (padded, y), likelihood, epochs=2, batch_size=4, compile=False)
    assert len(history.train_loss) == 2

    predictor = vbdl.Predictor(
        q, likelihood, None if method == "ensemble" else 3, compile=False, tiles=ROWS, joint=True
    )
    predictor(full)  # traced without padding
    samples = predictor(padded, samples=True).samples
    execution = predictor.executions.drawing(predictor.check(padded))[0]
    assert execution.graph_plan.strategy == "stacked"
    model = execution.traced.model
    for draw in range(len(samples)):
        entries = model.entries(torch.tensor([draw]), 0)
        with torch.no_grad():
            expected = functional_call(model, {n: t[0] for n, t in entries.items()}, (), dict(padded))
        torch.testing.assert_close(samples[draw], expected, rtol=1e-5, atol=1e-5)

    predictor.save(tmp_path / "saved", architecture=f"{__name__}:{NETWORKS[name].__name__}")
    loaded = vbdl.load(tmp_path / "saved", trust=(__name__,))
    torch.testing.assert_close(loaded(padded).probs, predictor(padded).probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_members_are_those_of_the_network_itself(name):
    networks = [network.eval() for network in members(name)]
    padded, _ = inputs(name)
    predictor = vbdl.Predictor(vbdl.DeepEnsemble(networks), vbdl.Categorical(), compile=False)
    with torch.no_grad():
        expected = torch.stack([network(**padded).logits for network in networks]).softmax(-1)
    torch.testing.assert_close(predictor(padded, samples=True).samples.softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_fresh_members_begin_as_the_class_initializes_them(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.uniform_(3.0, 4.0)  # looks trained
    q = vbdl.DeepEnsemble(network, 2)
    trainable = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in q.stacked().items() if p.requires_grad}
    for n in trainable:
        one, two = q.stacked()[n].detach()
        expected = before[n]
        if expected.unique().numel() == 1:  # a constant: biases, scales of norms, the second factor of an adapter
            assert torch.equal(one, expected) and torch.equal(two, expected), n
            continue
        assert not torch.equal(one, two), n
        if expected.numel() > 100:
            torch.testing.assert_close(one.std(), expected.std(), rtol=0.4, atol=0)
    if name == "lora":
        base = {n for n, p in network.named_parameters() if not p.requires_grad}
        assert base <= set(q.shared()), "the frozen base is held once"
        assert all(torch.equal(q.shared()[n], before[n]) for n in base)
