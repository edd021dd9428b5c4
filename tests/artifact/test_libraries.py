"""Descriptions of networks that a library builds, written by somebody hostile. Real libraries: tests/zoo."""

import sys
import types

import pytest
from torch import nn

from vbdl.artifact import ArtifactError, libraries, networks
from vbdl.artifact.manifest import Library


class Config:
    @classmethod
    def from_dict(cls, config):
        return types.SimpleNamespace(**config)


class PreTrainedModel(nn.Linear):
    config_class = Config

    def __init__(self, config):
        super().__init__(config.size, 2)


class OfALibrary(PreTrainedModel):
    pass


class TimmWrapperModel(PreTrainedModel):
    pass


@pytest.fixture
def calls(monkeypatch):
    """The calls of stand-ins for the libraries, with their arguments."""
    called = []

    def create(name, **arguments):
        called.append((name, arguments))
        return nn.Linear(3, 2)

    class LoraConfig:
        def __init__(self, **arguments):
            called.append(arguments)

    models = types.SimpleNamespace(
        list_models=lambda: ["resnet18"], get_model_builder=lambda name: lambda: None, get_model=create
    )
    stand_ins = {
        "timm": types.SimpleNamespace(is_model=lambda name: name == "resnet18", create_model=create),
        "torchvision": types.SimpleNamespace(models=models),
        "torchvision.models": models,
        "transformers": types.SimpleNamespace(
            PreTrainedModel=PreTrainedModel,
            OfALibrary=OfALibrary,
            TimmWrapperModel=TimmWrapperModel,
            pipeline=create,
            Config=Config,
        ),
        "peft": types.SimpleNamespace(LoraConfig=LoraConfig, get_peft_model=lambda base, config, name: base),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    return called


def description(library, name, arguments, base=None):
    return Library(library, name, arguments, {}, base)


REFUSED = {
    "weights from the internet": ("timm", "resnet18", {"pretrained": True}, "with the argument 'pretrained'"),
    "weights from a file": ("timm", "resnet18", {"checkpoint_path": "/etc/x"}, "with the argument 'checkpoint_path'"),
    "a model of the hub": ("timm", "hf-hub:me/evil", {}, "timm has no model 'hf-hub:me/evil'"),
    "weights of torchvision": ("torchvision", "resnet18", {"weights": "DEFAULT"}, "with the argument 'weights'"),
    "no model of torchvision": ("torchvision", "get_weight", {}, "torchvision has no model 'get_weight'"),
    "a function": ("transformers", "pipeline", {"config": {}}, "transformers has no model 'pipeline'"),
    "a model of another library": ("transformers", "TimmWrapperModel", {"config": {"size": 3}}, "has no model 'Timm"),
    "such a part": (
        "transformers", "OfALibrary", {"config": {"vision": {"model_type": "timm_wrapper"}}}, "of a timm model is not",
    ),
    "no model": ("transformers", "Config", {"config": {}}, "transformers has no model 'Config'"),
    "kernels of the hub": (
        "transformers", "OfALibrary", {"config": {"size": 3}, "attention": "me/evil"}, "attention= of eager, sdpa",
    ),
    "a further argument": ("transformers", "OfALibrary", {"config": {"size": 3}, "x": 1}, "built from a configuration"),
    "no configuration": ("transformers", "OfALibrary", {"config": 3}, "is built from a configuration"),
    "no adapters": ("peft", "PeftModel", {}, "without the network"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_was_never_described_is_refused(case, calls):
    library, name, arguments, message = REFUSED[case]
    with pytest.raises(ArtifactError, match=message):
        libraries.build(description(library, name, arguments), None)
    assert calls == []


ENTRIES = [
    {"auto_map": {"AutoModel": "evil.Model"}},
    {"_attn_implementation": "me/evil"},
    {"attn_implementation": "me/evil"},
    {"quantization_config": {"quant_method": "evil"}},
    {"use_pretrained_backbone": True},
    {"backbone": "hf-hub:me/evil"},
    {"use_kernels": True},
    {"architecture": "hf-hub:me/evil"},
    {"model_args": {"checkpoint_path": "/etc/x"}},
    {"checkpoint_path": "/etc/x"},
    {"pretrained_cfg": {"file": "/etc/x"}},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: next(iter(entry)))
@pytest.mark.parametrize("place", [lambda e: e, lambda e: {"text_config": e}, lambda e: {"parts": [1, [e]]}])
def test_a_configuration_that_may_load_something_is_refused(place, entry, calls):
    with pytest.raises(ArtifactError, match=f"with the entry '{next(iter(entry))}'"):
        libraries.build(description("transformers", "OfALibrary", {"config": {"size": 3, **place(entry)}}), None)


@pytest.mark.parametrize("entry", [{"megatron_core": "evil"}, {"loftq_config": {}}, {"eva_config": {}}, "r"])
def test_adapters_with_other_settings_than_those_described_are_refused(entry, calls):
    with pytest.raises(ArtifactError, match="is not one of LoRA"):
        libraries.build(description("peft", "PeftModel", {"default": entry}), nn.Linear(3, 2))
    assert calls == []


def test_what_was_described_is_built(calls):
    built = libraries.build(description("transformers", "OfALibrary", {"config": {"size": 3}}), None)
    assert isinstance(built, OfALibrary) and built.in_features == 3
    libraries.build(description("timm", "resnet18", {"num_classes": 2}), None)
    libraries.build(description("torchvision", "resnet18", {"num_classes": 2}), None)
    assert calls == [
        ("resnet18", {"pretrained": False, "num_classes": 2}),
        ("resnet18", {"weights": None, "num_classes": 2}),
    ]


def test_every_library_needs_trust_also_the_one_of_the_base(calls):
    base = description("transformers", "OfALibrary", {"config": {"size": 3}})
    adapters = description("peft", "PeftModel", {"default": {"r": 2}}, base)
    for trust in ((), ("peft",), ("transformers",), ("vbdl",)):
        with pytest.raises(
            ArtifactError, match=r"trust=\('peft', 'transformers'\)\), on the command line --trust peft"
        ):
            networks.Maker(None, trust).make(adapters)
    assert calls == []


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArtifactError, match="built by the package timm, which cannot be imported"):
        networks.Maker(None, ("timm",)).make(description("timm", "resnet18", {}))


def test_a_network_of_a_library_that_is_changed_is_not_accepted(calls):
    made = Library("timm", "resnet18", {}, networks.settings(nn.Linear(3, 5)))
    with pytest.raises(ArtifactError, match="timm builds a different network: out_features is 2 and was 5"):
        networks.Maker(None, ("timm",)).make(made)
