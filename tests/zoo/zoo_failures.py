"""The cells of the zoo that fail today, and why. The test of a mended cell fails until its line here is removed."""

from zoo_case import METHODS

TRAINED = ("mean-field", "ensemble")
MEMBERS = ("ensemble", "fresh")

_KNOWN: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (
        "the module returns an object of several outputs and not one tensor",
        ("BERT", "DistilBERT", "PatchTST"),
        METHODS,
    ),
    (
        "the module returns an object of several outputs and not one tensor",
        ("GPT-2", "Llama", "T5"),
        TRAINED,
    ),
    (
        "the module returns an object of several outputs and not one tensor",
        ("Llama, LoRA", "Whisper"),
        (*TRAINED, "fresh"),
    ),
    (
        "the module returns an object of several outputs and not one tensor",
        ("ViT", "Wav2Vec2"),
        ("dropout", *TRAINED),
    ),
    ("in training the module returns the outputs of its auxiliary heads, too", ("torchvision googlenet",), METHODS),
    (
        "attention reads self.training once, for dropout and for something else",
        ("GPT-2", "Llama", "Llama, LoRA", "T5", "Whisper"),
        ("dropout",),
    ),
    (
        "no fresh members: parameters of the network's own without reset_parameters()",
        (
            "torchvision convnext",
            "torchvision vit",
            "torchvision swin",
            "timm convnext",
            "timm vit_tiny",
            "GPT-2",
            "Llama",
            "T5",
            "ViT",
            "Wav2Vec2",
            "weight_norm",
            "spectral_norm",
        ),
        ("fresh",),
    ),
    ("which dropouts are called depends on the values of the inputs", ("sparse MoE",), ("dropout",)),
    ("dropout of edges has an axis that folds the batch", ("PyG GAT",), ("dropout",)),
    ("the fused optimizer takes no complex weights", ("FNO",), METHODS),
    ("functional_call takes no DataParallel", ("DataParallel",), METHODS),
    (
        "there is no posterior of networks that draw by themselves",
        ("textbook layers", "bayesian-torch", "blitz", "torchbnn"),
        ("stochastic",),
    ),
]

FAILURES = {(name, method): reason for reason, names, methods in _KNOWN for name in names for method in methods}
