import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the other process")
def test_kernels_in_the_interpreter():
    """Everything marked `interpreter`; what it prints is shown when it fails."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), "-q", "-m", "interpreter and not slow", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder.parents[1],
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
