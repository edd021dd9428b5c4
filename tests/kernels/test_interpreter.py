import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HALF = [HERE / "test_sampled_linear.py", HERE / "test_allocations.py"]


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the other process")
@pytest.mark.parametrize(
    "files, marked",
    [
        pytest.param(HALF, "not slow", id="sampled linear"),
        pytest.param([HERE, *(f"--ignore={file}" for file in HALF)], "not slow", id="the others"),
        pytest.param([HERE], "slow", marks=pytest.mark.slow, id="slow"),
    ],
)
def test_kernels_in_the_interpreter(files, marked):
    """Everything marked `interpreter`, in halves of the same time; what it prints is shown when it fails."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-m", f"interpreter and {marked}", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


def test_works_without_triton():
    """Without triton every operator runs its reference, under the compiler too."""
    code = """
import sys
import torch
sys.modules["triton"] = None  # as if it were not installed
from vbdl_kernels import make_key, sampled_linear
x, mean = torch.ones(2, 3), torch.zeros(4, 3, requires_grad=True)
y = sampled_linear(x, mean, torch.ones(4, 3), make_key(0, range(5)), 1)
y.sum().backward()
assert y.shape == (5, 2, 4) and torch.equal(mean.grad, torch.full((4, 3), 10.0))
"""
    code += """
f = lambda key: torch.vmap(lambda key: sampled_linear(x, mean, torch.ones(4, 3), key, 1))(key)
assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(make_key(0, range(5))), y)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
