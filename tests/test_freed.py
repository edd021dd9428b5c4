"""Memory that predictions free stays with the process."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import vbdl
from vbdl.calling import freed

_FAULTS = """
import platform, resource, sys, torch
if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
values = [torch.empty(0) for _ in range(6)]
def faults():  # of 24 MiB that are taken and given back three times
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        for t in values:
            t.resize_(2**20).fill_(1.0)
        for t in reversed(values):
            t.untyped_storage().resize_(0)
            t.resize_(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
if "keep" in sys.argv:
    from vbdl.calling import freed
    freed.keep()
    faults()
print(faults())
"""


def test_freed_memory_is_not_faulted_in_again():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    faults = []
    for words in ([], ["keep"]):
        command = [sys.executable, "-c", _FAULTS, *words]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if run.returncode == 77:
            pytest.skip("only glibc")
        assert run.returncode == 0, run.stderr
        faults.append(int(run.stdout))
    assert faults[0] > 5_000 and faults[1] < 1000  # of 18,432 pages


def test_a_predictor_keeps_what_it_frees(monkeypatch):
    kept = []
    monkeypatch.setattr(freed, "keep", lambda: kept.append(True))
    vbdl.Predictor(vbdl.MCDropout(nn.Dropout(0.5)), vbdl.Categorical(), compile=False)(torch.randn(4, 3))
    assert kept
