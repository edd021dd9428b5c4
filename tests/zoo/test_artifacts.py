"""Networks of transformers, peft, timm and torchvision are saved and loaded without code of the user's."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl
from vbdl.artifact import ArtifactError

sys.path.insert(0, str(Path(__file__).parent))
from test_zoo import declare_operators  # noqa: E402

declare_operators()
transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LORA = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.1}


def bert(kind="BertForSequenceClassification", **settings):
    config = transformers.BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.3, **settings)
    return getattr(transformers, kind)(config)


def llama(**settings):
    config = transformers.LlamaConfig(**SIZES, **NO_TOKENS, num_key_value_heads=1, num_labels=3, **settings)
    return transformers.LlamaForSequenceClassification(config)


def other_head():
    network = torchvision.models.resnet18()
    network.fc = nn.Linear(512, 7)
    return network


def two_adapters():
    network = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", **LORA))
    network.add_adapter("other", peft.LoraConfig(target_modules=["value"], use_rslora=True))
    return network


def adapted(network, targets, **settings):
    return peft.get_peft_model(network, peft.LoraConfig(target_modules=targets, **{**LORA, **settings}))


def dense():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


TV = torchvision.models.get_model
TIMM = timm.create_model
NETWORKS = {
    "bert": bert,
    "bert, eager attention": lambda: bert(attn_implementation="eager"),
    "bert, tied words": lambda: bert("BertForMaskedLM"),
    "llama": llama,
    "LoRA on bert": lambda: adapted(bert(), ["query", "value"], task_type="SEQ_CLS", bias="lora_only"),
    "LoRA on bert, two adapters": two_adapters,
    "LoRA on llama, every layer": lambda: adapted(llama(), "all-linear", rank_pattern={"q_proj": 1}),
    "LoRA on llama, heads trained": lambda: adapted(llama(), ["q_proj"], modules_to_save=["score"], use_dora=True),
    "LoRA on layers of torch": lambda: adapted(dense(), ["0", "3"]),
    "LoRA on torchvision": lambda: adapted(other_head(), ["fc"]),
    "resnet18, a head of its own": other_head,
    "mobilenet": lambda: TV("mobilenet_v3_small", num_classes=5),
    "vit, dropout": lambda: TV("vit_b_32", image_size=64, dropout=0.1),
    "googlenet": lambda: TV("googlenet", init_weights=False),
    "resnext": lambda: TV("resnext50_32x4d"),
    "timm resnet, grey": lambda: TIMM("resnet10t", num_classes=4, in_chans=1, drop_rate=0.2),
    "timm vit, smaller": lambda: TIMM("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.1),
    "timm without a head": lambda: TIMM("mobilenetv3_small_050", num_classes=0),
}
TRUST = ("peft", "transformers", "timm", "torchvision")


def inputs(network):
    if hasattr(network, "config") and hasattr(network.config, "vocab_size"):
        ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return torch.randn(3, 3) if isinstance(first, nn.Linear) else torch.randn(2, first.in_channels, 64, 64)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_loaded_with_nothing_but_trust(name, tmp_path):
    network = NETWORKS[name]().eval()
    x = inputs(network)
    adapters = any("lora" in n for n, _ in network.named_parameters())
    q = vbdl.DeepEnsemble(network, 2) if adapters else vbdl.Deterministic(network)
    predict = vbdl.Predictor(q, vbdl.Categorical(), compile=False)
    vbdl.save(predict, tmp_path / "model", example=x)
    with pytest.raises(ArtifactError, match="which runs code") as error:
        vbdl.load(tmp_path / "model")
    packages = error.value.args[0].partition("trust=(")[2].partition(")")[0].replace("'", "").replace(",", " ").split()
    loaded = vbdl.load(tmp_path / "model", trust=packages, compile=False)
    assert torch.equal(loaded(x).probs, predict(x).probs)
    vbdl.save(loaded, tmp_path / "again", example=x)
    assert torch.equal(vbdl.load(tmp_path / "again", trust=TRUST, compile=False)(x).probs, predict(x).probs)
    card = (tmp_path / "again" / "README.md").read_text()
    assert all(repr(package) in card for package in packages)


class OfItsOwn(transformers.BertForSequenceClassification):
    def forward(self, **inputs):
        return super().forward(**inputs).logits * 2


def changed_layer():
    network = torchvision.models.resnet18()
    network.layer1 = nn.Identity()
    return network


def hooked():
    network = torchvision.models.resnet18()
    network.fc.register_forward_hook(lambda module, args, output: output * 20)
    return network


def other_forward():
    network = TIMM("vit_tiny_patch16_224", img_size=64)
    network.head.forward = lambda x: nn.functional.linear(x, network.head.weight) * 2
    return network


def other_order():
    network = TIMM("vit_tiny_patch16_224", img_size=64)
    blocks = network.blocks._modules
    first = next(iter(blocks))
    blocks[first] = blocks.pop(first)
    return network


@pytest.mark.parametrize(
    "make", [changed_layer, hooked, other_forward, other_order, lambda: OfItsOwn(transformers.BertConfig(**SIZES))]
)
def test_a_network_that_the_library_does_not_build_is_supplied(make, tmp_path):
    network = make().eval()
    vbdl.save(vbdl.Predictor(vbdl.Deterministic(network), vbdl.Categorical(), compile=False), tmp_path / "model")
    with pytest.raises(ArtifactError, match="does not describe its network"):
        vbdl.load(tmp_path / "model", trust=TRUST)
