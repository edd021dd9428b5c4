"""Posteriors on the adapters of peft, as peft makes them, on a BERT and a Llama without trained weights."""

import collections
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    "BLoB": lambda net: vbdl.MeanField(net, ROWS, parameters=["*.lora_A.*"]),
    "Laplace": lambda net: vbdl.Laplace(net, parameters="all"),
    "SWAG": lambda net: vbdl.SWAG(net, rank=2, collect_from=0),
}
REFUSED = {("Laplace", "DoRA"): "structure='diagonal'"}


class Products(TorchDispatchMode):
    """Counts the products of two matrices by the number of rows (or columns, where rows are columns)."""

    def __init__(self):
        super().__init__()
        self.rows = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.rows.update({left.shape[0], right.shape[1]})
        return func(*args, **(kwargs or {}))


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
    p = predict(x, samples=True)
    assert float(p.samples.std(0).max()) > 0  # BLoB's B is still near 0
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
        for p in member.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    q = vbdl.DeepEnsemble(members)
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=compile)
    with torch.no_grad():
        expected = torch.stack([member(**x).logits for member in members]).softmax(-1).mean(0)
    torch.testing.assert_close(predict(x).probs, expected, rtol=1e-4, atol=1e-5)


def test_the_base_is_one_product_for_all_members_and_stored_once(tmp_path):
    """Layers of the base are computed on (members x rows) in one product; an artifact has them once."""
    net, x = llama(init_lora_weights=False).eval(), inputs()
    q = vbdl.DeepEnsemble(net, 4)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    adapters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(t.numel() for t in q.shared().values()) <= frozen + 100  # buffers
    assert sum(p.numel() for p in q.stacked_parameters.parameters()) == 4 * adapters
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False, tiles=ROWS)
    predict(x)
    execution = predict.executions.drawing(predict.check(x))[0]
    assert execution.graph_plan.strategy == "stacked" and execution.graph_plan.chunk == 4
    text = execution.explain()
    assert "once for all draws" in text, text
    with Products() as products:
        predict(x)
    assert products.rows[4 * ROWS * 7] >= 4 + 7, "the second layer's 7 base weights, and what is after the first's"
    predict.save(tmp_path / "saved")
    stored = sum(f.stat().st_size for f in (tmp_path / "saved").rglob("*.safetensors"))
    assert stored < 4 * (frozen + 4 * adapters) + 20_000, "numbers, names and shapes"


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
    assert report.adapters == ["default: LoRA of rank 4 on 4 layers, 512 parameters, trainable"]
    assert any("lora_dropout" in line for line in report.stochastic)


def test_the_recipe_of_the_tutorial_runs(monkeypatch, tmp_path):
    """With a model from its configuration in place of the downloaded one."""
    text = (Path(__file__).parents[2] / "docs" / "tutorials" / "lora.md").read_text()
    code = text.partition("## With Hugging Face and peft")[2].partition("```python\n")[2].partition("```")[0]
    config = transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=WORDS, num_labels=2)
    made = transformers.DistilBertForSequenceClassification(config)
    tokens = lambda name: lambda texts, **_: inputs()
    from_pretrained = lambda name, num_labels: made
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokens)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VBDL_COMPILE", "never")
    names = {"vbdl": vbdl, "texts": ["a"] * ROWS, "labels": torch.tensor([0, 1] * (ROWS // 2))}
    exec(code, names)  # noqa: S102
    assert names["predict"].posterior.n_members == 5 and names["p"].probs.shape == (ROWS, 2)
    torch.testing.assert_close(names["predict"](names["tokens"]).probs, names["p"].probs, rtol=1e-5, atol=1e-6)
