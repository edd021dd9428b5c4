import json

import pytest
import torch
from vbdl_kernels import card, measured, regime

TIMES = {  # seconds of a card that draws slowly and multiplies fast
    "launch": 1e-6, "copy": 2e-3, "product bfloat16": 1e-4, "product float32": 2e-3, "product tf32": 2e-4,
    "fused 16": 4e-2, "fused 128": 4e-2,
    "fused bfloat16 16": 1e-3, "sampler bfloat16 16": 2e-3, "fused bfloat16 32": 1e-3, "sampler bfloat16 32": 2e-3,
    "fused bfloat16 64": 3e-3, "sampler bfloat16 64": 2e-3,  # the crossing
    "fused tf32 16": 3e-3, "sampler tf32 16": 2e-3,  # at once
    "network": 9e-6,
}  # fmt: skip


@pytest.fixture
def constants_file(monkeypatch, tmp_path):
    """A device of this name, whose files are in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(card, "device_name", lambda: "Card 9000")
    card._read.cache_clear()
    yield card.path_of("Card 9000")
    card._read.cache_clear()


def measure():
    called = []

    def timer(name, call):
        call()  # each runs, on its reference
        called.append(name)
        return TIMES[name]

    found = measured.measure(timer, device="cpu", size=16, samples=2)
    assert called == list(TIMES)
    return found


def test_measured_constants_decide(constants_file):
    before = regime.choose(32, 16, 4096, 4096, memory_budget=2**33)
    assert before == "fused" and regime.device_card() == regime.Card()
    found = measure()
    assert set(found) == set(regime.Card.__dataclass_fields__)
    count = 2 * 16 * 16
    assert found["normals"] == pytest.approx(count / (4e-2 - 1e-6))
    assert found["bytes"] == pytest.approx(8 * count / (2e-3 - 1e-6))
    assert found["half_flops"] == pytest.approx(2 * count * 1024 / (1e-4 - 1e-6))
    assert found["float_flops"] == pytest.approx(10 * found["exact_flops"], rel=0.01)
    assert (found["half_rows"], found["float_rows"]) == (32, 8)
    assert found["step"] == pytest.approx(2e-6)
    assert torch.get_float32_matmul_precision() == "highest"  # as it was
    # a card that multiplies as the default one but draws a hundredth as fast draws no row twice
    slow = {**vars(regime.Card()), "normals": 1.6e10}  # and where no crossing was measured
    card.keep("Card 9000", slow)
    assert regime.device_card() == regime.Card(**slow)
    assert regime.choose(32, 256, 4096, 4096, memory_budget=2**33) == "sampler"
    assert json.loads(constants_file.read_text())["device"] == "Card 9000"
    assert [p.name for p in constants_file.parent.iterdir()] == [constants_file.name]  # nothing half written beside it


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 1}', '{"format": 99, "constants": {}}', '{"format": 3, "constants": {"normals": "x"}}'],
)
def test_a_file_that_cannot_be_read_is_as_none(constants_file, content):
    constants_file.parent.mkdir(parents=True)
    constants_file.write_text(content)
    assert regime.device_card() == regime.Card()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_constants_that_cannot_be_are_refused(constants_file, value):
    card.keep("Card 9000", {**vars(regime.Card()), "normals": value})
    assert regime.device_card() == regime.Card()


def test_a_write_that_fails_leaves_the_old_file(constants_file, monkeypatch):
    good = {**vars(regime.Card()), "normals": 2e12}
    card.keep("Card 9000", good)
    with pytest.raises(TypeError):
        card.keep("Card 9000", {"normals": object()})  # type: ignore[dict-item]
    assert regime.device_card().normals == 2e12
    assert len(list(constants_file.parent.iterdir())) == 1


def test_without_an_accelerator_there_is_nothing_to_read():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an accelerator; the GPU tests measure this one")
    assert card.device_name() is None and regime.device_card() == regime.Card()
    with pytest.raises(SystemExit, match="no accelerator"):
        measured.main()
