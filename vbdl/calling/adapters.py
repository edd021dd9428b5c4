"""Adapters of peft: what makes them idle or frozen, and how they are initialized. peft itself is not imported.

A layer of peft holds the layer that it adapts and one pair of matrices for each adapter, by the adapter's name:
`lora_A`, `lora_B` (`lora_embedding_A`, `lora_embedding_B`), in DoRA also `lora_magnitude_vector`. `modules_to_save` are
copies of whole modules, trained beside them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vbdl.calling.traversing import Modules

_RANDOM = (True, False, "gaussian", "orthogonal")  # initializations of LoRA that do not depend on the base weights


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of every layer that holds LoRA adapters."""
    for name, m in network.named_modules():
        if callable(getattr(type(m), "reset_lora_parameters", None)) and hasattr(m, "lora_A"):
            yield name, m


def check_adapters(modules: Modules) -> None:
    """Raise ValueError if adapters have no effect on the outputs: merged into the base weights, or disabled.

    modules: those of a network by name.
    """
    for name, m in modules:
        if "base_layer" not in m._modules or not isinstance(getattr(m, "merged_adapters", None), list):
            continue
        if m.merged_adapters:
            raise ValueError(
                f"the adapters of layer '{name}' are merged into its base weights and have no effect of their own: "
                f"call unmerge_adapter() to draw or train them, or merge_and_unload() to keep the merged network"
            )
        if getattr(m, "_disable_adapters", False):
            raise ValueError(
                f"the adapters of layer '{name}' are disabled and have no effect: enable them, e.g. predict outside of "
                f"`with network.disable_adapter()`"
            )


def how_to_unfreeze(network: nn.Module) -> str:
    """What to add to an error about a network without trainable parameters: how peft loads adapters to train."""
    if not any(True for _ in adapted_layers(network)):
        return ""
    return " (peft freezes adapters that it loads: PeftModel.from_pretrained(base, folder, is_trainable=True))"


def described_adapters(network: nn.Module) -> list[str]:
    """One line for each LoRA adapter: its rank, how many layers it is on, and how many numbers it has."""
    layers: dict[str, list[list[nn.Parameter]]] = {}
    ranks: dict[str, set[int]] = {}
    for _, layer in adapted_layers(network):
        for adapter in dict.fromkeys([*layer.lora_A, *layer.lora_embedding_A]):
            layers.setdefault(adapter, []).append(list(_tensors(layer, adapter)))
            pair = layer.lora_A[adapter].weight if adapter in layer.lora_A else layer.lora_embedding_A[adapter]
            ranks.setdefault(adapter, set()).add(len(pair))
    lines = []
    for adapter, held in layers.items():
        count, rank = sum(p.numel() for each in held for p in each), ", ".join(map(str, sorted(ranks[adapter])))
        state = "trainable" if any(p.requires_grad for each in held for p in each) else "frozen"
        lines.append(f"{adapter}: LoRA of rank {rank} on {len(held)} layers, {count:,} parameters, {state}")
    return lines


def reset_adapters(network: nn.Module) -> set[nn.Module]:
    """Initialize trainable adapters as their configuration says, in place; returns the modules that they are part of.

    LoRA's A is random and its B zero, so that members start as the base network and differ in A alone. Embeddings and
    output layers of a language model among the `modules_to_save` start as those of the base.
    Raises ValueError for an initialization that is a function of the base weights: all members would be equal.
    """
    reached: set[nn.Module] = set()
    for name, layer in adapted_layers(network):
        reached.update(layer.modules())
        for adapter in dict.fromkeys([*layer.lora_A, *layer.lora_embedding_A]):
            if any(p.requires_grad for p in _tensors(layer, adapter)):
                _reset(name, layer, adapter, _initialization(network, adapter))
    for copies, original in _pretrained_copies(network):
        reached.update(copies.modules())
        for copy in copies.children():
            for p, value in zip(copy.parameters(), original.parameters(), strict=True):
                p.copy_(value)
    return reached


def _tensors(layer: Any, adapter: str) -> Iterator[nn.Parameter]:
    """The parameters of one adapter of a layer."""
    for held in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter in held:
            yield from held[adapter].parameters() if isinstance(held[adapter], nn.Module) else [held[adapter]]


def _initialization(network: nn.Module, adapter: str) -> Any:
    """The `init_lora_weights` of an adapter's configuration; True without one."""
    for m in network.modules():
        configs = vars(m).get("peft_config")
        if isinstance(configs, dict) and adapter in configs:
            return getattr(configs[adapter], "init_lora_weights", True)
    return True


def _reset(name: str, layer: Any, adapter: str, how: Any) -> None:
    if how not in _RANDOM:
        raise ValueError(
            f"the adapter '{adapter}' of layer '{name}' was initialized with init_lora_weights={how!r}, a function of "
            f"the base weights or of data, so all members would start equal: choose init_lora_weights=True, or give "
            f"DeepEnsemble a list of networks, e.g. trained on other orders of the rows"
        )
    if how == "orthogonal":
        pairs = [(layer.lora_A[adapter], layer.lora_B[adapter])] if adapter in layer.lora_A else []
        before = [(m, m.weight) for pair in pairs for m in pair]
        layer.orthogonal_init(adapter)
        for m, p in before:  # the adapter's own parameters, which peft replaces
            p.copy_(m.weight)
            m.weight = p
    elif how is False and adapter in layer.lora_A:  # random both, as nn.Linear initializes them
        for m in (layer.lora_A[adapter], layer.lora_B[adapter]):
            m.reset_parameters()
    else:
        layer.reset_lora_parameters(adapter, how or True)
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if adapter in magnitudes and adapter in layer.lora_A:
        magnitude = magnitudes[adapter]
        norms = magnitude.weight
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[adapter])
        norms.copy_(magnitude.weight)
        magnitude.weight = norms


def _pretrained_copies(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (trainable copies, original) of the embeddings and output layers of language models that are retrained."""
    outputs = set()
    for m in network.modules():
        function = getattr(type(m), "get_output_embeddings", None)
        if callable(function):
            try:
                outputs.add(function(m))
            except (AttributeError, NotImplementedError):  # this class has none
                continue
    for m in network.modules():
        original, copies = m._modules.get("original_module"), m._modules.get("modules_to_save")
        if original is None or copies is None:
            continue
        if isinstance(original, nn.Embedding) or m in outputs or original in outputs:
            yield copies, original


@torch.no_grad()
def with_frozen_of(copy: nn.Module, module: nn.Module) -> nn.Module:
    """Let a copy of a module use the module's frozen parameters where they are equal, instead of copies of its own."""
    originals = dict(module.named_modules())
    for name, m in copy.named_modules():
        for leaf, p in m._parameters.items():
            original = originals[name]._parameters.get(leaf) if name in originals else None
            if p is None or original is None or p.requires_grad or original.requires_grad:
                continue
            if p.shape == original.shape and p.dtype == original.dtype and torch.equal(p, original):
                m._parameters[leaf] = original
    return copy
