"""Posteriors on the adapters of peft, as peft makes them, on a BERT and a Llama without trained weights."""

import copy

import pytest
import torch
from torch import nn

import vbdl

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # peft and transformers warn of each other

ROWS, WORDS, CLASSES = 6, 50, 3
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": WORDS,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def bert(**settings):
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=CLASSES))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"], **settings))


def llama(**settings):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **NO_TOKENS)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(**settings))


NETWORKS = {
    "BERT": lambda: bert(task_type="SEQ_CLS", lora_dropout=0.1),
    "Llama": lambda: llama(task_type="CAUSAL_LM", lora_dropout=0.1),
    "ranks": lambda: llama(rank_pattern={"q_proj": 2}, use_rslora=True),
    "DoRA": lambda: llama(use_dora=True),
    "every layer": lambda: llama(target_modules="all-linear"),
    "bias": lambda: bert(lora_bias=True, bias="lora_only"),
    "embedding": lambda: llama(target_modules=["embed_tokens", "v_proj"]),
}
METHODS = {
    "DeepEnsemble": lambda net: vbdl.DeepEnsemble(net, 3),
    "MeanField": lambda net: vbdl.MeanField(net, ROWS),
    "BLoB": lambda net: vbdl.MeanField(net, ROWS, parameters=["*.lora_A.*", "*.lora_embedding_B.*"]),
    "Laplace": lambda net: vbdl.Laplace(net, parameters="all"),
    "SWAG": lambda net: vbdl.SWAG(net, rank=2, collect_from=0),
}
REFUSED = {("Laplace", "DoRA"): "structure='diagonal'"}


def inputs():
    ids = torch.randint(1, WORDS, (ROWS, 7), generator=torch.Generator().manual_seed(0))
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_fitted_predicted_saved_and_loaded_and_the_base_stays(method, name, tmp_path):
    torch.manual_seed(0)
    net, x, likelihood = NETWORKS[name](), inputs(), vbdl.Categorical()
    with torch.no_grad():
        shape = net.eval()(**x).logits.shape
    y, base = torch.randint(shape[-1], shape[:-1]), {n: p.clone() for n, p in net.named_parameters()}
    q = METHODS[method](net)
    fit = lambda: vbdl.fit(
        q, (x, y), likelihood, epochs=0 if method == "Laplace" else 2, lr=1e-2, compile=False, progress=False
    )
    if why := REFUSED.get((method, name)):
        with pytest.raises(ValueError, match=why):
            fit()
        return
    fit()
    predict = vbdl.Predictor(q, likelihood, None if q.n_draws else 4, compile=False)
    p = predict(x)
    assert float(p.epistemic.mean()) > 0
    held = {n.rpartition("inner.")[2]: t for n, t in q.shared().items()}
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert frozen and all(torch.equal(held[n], base[n]) for n in frozen), "the base is held once, as it was"
    predict.save(tmp_path / "saved")
    loaded = vbdl.load(tmp_path / "saved", module=NETWORKS[name]())
    torch.testing.assert_close(loaded(x).probs, p.probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BERT", "Llama", "DoRA"])
@pytest.mark.parametrize("compile", [False, True])
def test_an_ensemble_answers_as_the_loop_over_pefts_adapters(name, compile):
    torch.manual_seed(0)
    net, x = NETWORKS[name]().eval(), inputs()
    members = [copy.deepcopy(net) for _ in range(3)]
    for member in members:
        for n, p in member.named_parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    q = vbdl.DeepEnsemble(members)
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=compile)
    with torch.no_grad():
        expected = torch.stack([member(**x).logits for member in members]).softmax(-1).mean(0)
    torch.testing.assert_close(predict(x).probs, expected, rtol=1e-4, atol=1e-5)


def test_the_base_is_one_product_for_all_members():
    """Layers of the base are computed on (members x rows) in one product, and stored once."""
    net, x = llama(init_lora_weights=False).eval(), inputs()
    q = vbdl.DeepEnsemble(net, 4)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    adapters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(t.numel() for t in q.shared().values()) <= frozen + 100  # buffers
    assert sum(t.numel() for t in q.stacked().values()) == 4 * adapters
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False, tiles=ROWS)
    predict(x)
    execution = predict.executions.drawing(predict.check(x))[0]
    assert execution.graph_plan.strategy == "stacked" and execution.graph_plan.chunk == 4
    text = execution.explain()
    assert "once for all draws" in text, text


def test_adapters_of_a_saved_folder_are_an_ensemble(tmp_path):
    """Adapters that were trained and saved by peft, loaded frozen: the members differ in them and share the base."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **NO_TOKENS))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for m in range(3):
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / f"{m}")
    members = [peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"{m}") for m in range(3)]
    q, x = vbdl.DeepEnsemble(members), inputs()
    assert all("lora_" in name for name, _ in q.stacked_parameters.named_parameters())
    with torch.no_grad():
        expected = torch.stack([member(**x).logits for member in members]).softmax(-1).mean(0)
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False)
    torch.testing.assert_close(predict(x).probs, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="is_trainable=True"):
        vbdl.Laplace(members[0], parameters="all")
    members[0].merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        vbdl.DeepEnsemble(members)
    merged = members[0].merge_and_unload()
    assert vbdl.Predictor(vbdl.Deterministic(merged), vbdl.Categorical(), compile=False)(x).probs.shape[-1] == WORDS


def test_inspect_lists_adapters():
    report = vbdl.inspect(NETWORKS["Llama"](), inputs())
    assert report.trainable == 2 * 2 * (4 * 16 + 16 * 4)
    assert any("lora_dropout" in line for line in report.stochastic)
