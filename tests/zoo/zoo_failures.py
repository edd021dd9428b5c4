"""The cells of the zoo that fail today, and why. The test of a mended cell fails until its line here is removed."""

_KNOWN: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("which dropouts are called depends on the values of the inputs", ("sparse MoE",), ("dropout",)),
    ("dropout of edges has an axis that folds the batch", ("PyG GAT",), ("dropout",)),
]

FAILURES = {(name, method): reason for reason, names, methods in _KNOWN for name in names for method in methods}
