"""The model card (README.md) of an artifact, written from its manifest alone."""

from collections.abc import Iterator

from vbdl.artifact.manifest import (
    Architecture,
    Dropout,
    Ensemble,
    Layer,
    Layers,
    Library,
    Manifest,
    Plain,
    Reference,
    Registered,
    Single,
    Supplied,
)
from vbdl.engine.settings import are_default
from vbdl.methods import METHODS, words
from vbdl.types import Json


def card(manifest: Manifest) -> str:
    """The text of README.md, with the YAML front matter that the Hugging Face Hub reads."""
    parts = [
        "---\nlibrary_name: vbdl\ntags:\n- uncertainty\n- bayesian-deep-learning\n- pytorch\n---\n",
        f"# {method(manifest)}\n",
        "A predictor of [vbdl](https://pypi.org/project/vbdl/): predictions with their uncertainty, split into noise "
        "in the data (aleatoric) and not knowing (epistemic).\n",
        f'```python\nimport vbdl\n\npredict = vbdl.load("this folder"{_needed(manifest)})\np = predict(x)\n'
        f"{', '.join('p.' + name for name in fields(manifest.likelihood))}\n```\n",
        _table(("", ""), facts(manifest)),
    ]
    if manifest.metrics:
        parts += ["## Metrics\n", _table(("metric", "value"), figures(manifest.metrics))]
    if manifest.extras:
        parts += ["Also stored: " + ", ".join(f"`{_plain(k)}`" for k in manifest.extras) + ".\n"]
    return "\n".join(parts)


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """The rows (name, text) of the card's first table: method, network, inputs, draws, size, versions."""
    s, v = manifest.settings, manifest.versions
    numbers = sum(_count(e.shape) for n, e in manifest.tensors.items() if n.startswith("posterior."))
    rows = [
        ("method", method(manifest)),
        ("network", network(manifest)),
        ("input of a row", inputs(manifest)),
        ("likelihood", likelihood(manifest.likelihood)),
        *(("fitted", _plain(text)) for text in manifest.fitted),
        ("draws", f"{s.n_samples}, seed {s.seed}"),
        ("tiles", f"{', '.join(map(str, s.tiles))} rows{_SERVED if are_default(s.tiles) else ''}"),
        ("numbers stored", f"{numbers:,} in {manifest.file_bytes:,} bytes, SHA-256 {manifest.file_sha256[:16]}…"),
        (
            "training rows",
            f"{manifest.training_rows:,} different rows, known by fingerprint: calibrating on them is refused"
            if manifest.training_rows
            else "not recorded: calibrating on them cannot be refused",
        ),
        ("written by", f"vbdl {v.vbdl}, torch {v.torch}, format {manifest.format}"),
    ]
    if s.autocast is not None:
        rows.insert(6 + len(manifest.fitted), ("network runs in", s.autocast))
    return rows


def fields(described: Json) -> list[str]:
    """The names of the fields of a prediction with this likelihood, the prediction itself first."""
    arguments = described.get("arguments", {})
    inner = arguments.get("likelihood", {}).get("module") if isinstance(arguments, dict) else None
    if inner is not None:
        outer = [arguments.get(key, {}).get("module", {}) for key in ("method", "decision")]
        rules = [rule for module in outer for rule in module.get("arguments", {}).get("rules", {}).get("modules", ())]
        added = [name for module in (*outer, *rules) for name in _ADDED.get(str(module.get("class")), ())]
        return [*fields(inner), *dict.fromkeys(added)]
    name = str(described.get("class"))
    leading = ["probs", "label"] if name in ("Categorical", "Bernoulli") else [] if ":" in name else ["mean", "std"]
    return [*leading, "total", "aleatoric", "epistemic"]


_SERVED = "; vbdl serve computes in tiles of 64, for equal bits in every batch"

_ADDED = {
    "ConformalSets": ("sets",),
    **dict.fromkeys(("AbsoluteIntervals", "NormalizedIntervals", "CQR"), ("lower", "upper")),
    **dict.fromkeys(("Referral", "ExpectedCost", "AnomalyFlags"), ("action",)),
    "AnyOf": ("action", "reason"),
    "OutOfDistribution": ("action", "distance"),
    "HandOver": ("action", "risk"),
    "Risk": ("action", "var", "es"),
}


def _needed(manifest: Manifest) -> str:
    """The further arguments that `vbdl.load` needs for this artifact, as source text: ", module=network"."""
    q = manifest.posterior
    each = [g.member.network for g in q.members] if isinstance(q, Ensemble) else [q.network]
    if any(isinstance(a, Supplied) for a in each):
        return ", module=network" if len(each) == 1 else ", module=networks"
    packages = dict.fromkeys(target.partition(".")[0].partition(":")[0] for target in _imported(manifest))
    trusted = [name for name in packages if name != "vbdl"]
    return f", trust=({', '.join(map(repr, trusted))},)" if trusted else ""


def _imported(manifest: Manifest) -> Iterator[str]:
    """Yield every "module:name" that `vbdl.load` imports for this artifact."""
    q = manifest.posterior
    for single in [g.member for g in q.members] if isinstance(q, Ensemble) else [q]:
        if isinstance(single, Registered):
            yield single.name
        if isinstance(single.network, Reference):
            yield single.network.target
        if isinstance(single.network, Library):
            yield from (f"{package}:{single.network.name}" for package in single.network.packages)
        if isinstance(single.network, Layers):
            yield from _classes_of_layers(single.network.root)
    yield from _classes(manifest.likelihood)


def _classes_of_layers(layer: Layer) -> Iterator[str]:
    """Yield the "module:name" of every registered class among a layer and its descendants."""
    if ":" in layer.name:
        yield layer.name
    for child in layer.children.values():
        yield from _classes_of_layers(child)


def _classes(described: Json) -> Iterator[str]:
    """Yield the "module:name" of every registered class among a stored module and the modules in its arguments."""
    if ":" in str(described.get("class")):
        yield str(described["class"])
    for value in described.get("arguments", {}).values():
        if isinstance(value, dict) and isinstance(value.get("module"), dict):
            yield from _classes(value["module"])


def figures(metrics: Json) -> list[tuple[str, str]]:
    """The metrics as rows (name, text): "group name" for one in a group, "value [lower, upper]" for an interval."""
    rows: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if not isinstance(value, dict):
            rows.append((name, _number(value)))
        elif {"value", "lower", "upper"} <= value.keys():
            number, lower, upper = (_number(value[key]) for key in ("value", "lower", "upper"))
            rows.append((name, f"{number} [{lower}, {upper}] {_plain(str(value.get('unit', '')))}".strip()))
        else:
            rows += [(f"{name} {inner}", text) for inner, text in figures(value)]
    return rows


def method(manifest: Manifest) -> str:
    """The method in words, like "Deep ensemble of 5 members"."""
    q = manifest.posterior
    if isinstance(q, Ensemble):
        count = sum(group.count for group in q.members)
        kinds = {type(group.member): group.member for group in q.members}
        inner = next(iter(kinds.values()))
        of = "" if isinstance(inner, Plain) else f" of {_single(inner)}"
        several = f", {len(q.members)} architectures" if len(q.members) > 1 else ""
        return _as_title(f"{words('DeepEnsemble')} of {count} members{of}{several}")
    return _as_title(_single(q)) if not isinstance(q, Registered) else _single(q)


def _single(q: Single) -> str:
    if isinstance(q, Registered):
        of_vbdl = {f"{m.module}:{m.class_name}": m.words for m in METHODS.values()}
        return of_vbdl.get(q.name, _class_name(q.name))
    return words("MCDropout" if isinstance(q, Dropout) else "MeanField")


def _as_title(said: str) -> str:
    return said[0].upper() + said[1:]


def network(manifest: Manifest) -> str:
    q = manifest.posterior
    each = [g.member.network for g in q.members] if isinstance(q, Ensemble) else [q.network]
    return "; ".join(_architecture(a) for a in each)


def _architecture(a: Architecture) -> str:
    if isinstance(a, Layers):
        inside = [_class_name(child.name) for child in a.root.children.values()]
        name = _class_name(a.root.name)
        return f"{name}({', '.join(inside)})" if inside else name
    if isinstance(a, Reference):
        origin = f"made by `{_plain(a.target)}`"
        return origin if a.target.startswith("vbdl.") else f"{origin}; load imports it only with trust="
    if isinstance(a, Library):
        inner = "" if a.base is None else f" on {_architecture(a.base)}"
        return f"`{_plain(a.name)}` of {a.library}{inner}"
    return f"`{_plain(a.name)}`; pass it to load(module=...)"


def inputs(manifest: Manifest) -> str:
    if manifest.inputs is None:
        return "not recorded"
    return ", ".join(f"{_plain(e.name) + ': ' if e.name else ''}{e.dtype} {e.shape}" for e in manifest.inputs.tensors)


def likelihood(described: Json) -> str:
    """The likelihood in words, innermost first: "Categorical, calibrated by Temperature, deciding by Referral"."""
    arguments = described.get("arguments", {})
    inner = arguments.get("likelihood", {}).get("module") if isinstance(arguments, dict) else None
    name = _class_name(described.get("class"))
    if inner is None:
        return name
    for key, word in (("method", "calibrated by"), ("decision", "deciding by")):
        if key in arguments:
            return f"{likelihood(inner)}, {word} {_class_name(arguments[key].get('module', {}).get('class'))}"
    return f"{likelihood(inner)} in {name}"


def _class_name(stored: object) -> str:
    """The class name without the module path under which registered classes are stored."""
    return _plain(str(stored).rpartition(":")[2])


def _count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _plain(str(value))


def _plain(text: str) -> str:
    """The text without characters that would end a table cell, a line or a code span; at most 400 characters."""
    return text.translate({ord(c): " " for c in "|\n\r`<>"})[:400]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {_plain(a)} | {b} |" for a, b in rows)]
    return "\n".join(lines) + "\n"
