import pytest
import torch

from vbdl.data.fingerprint import fingerprints


def test_equal_rows_and_only_those_are_equal():
    x = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0))
    x[777] = x[3]
    found = fingerprints(x)
    assert found[777] == found[3]
    assert found.unique().numel() == 19_999
    order = torch.randperm(20_000)
    assert torch.equal(fingerprints(x[order]), found[order])
    assert torch.equal(fingerprints(x[5:6])[0], found[5])


def test_structured_rows_do_not_collide():
    # powers of two, exchanged columns, shifted values, one-hot rows: what a weak sum would confuse
    grid = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])] * 5)
    assert fingerprints(grid).unique().numel() == 5**5
    assert fingerprints(torch.eye(600)).unique().numel() == 600
    images = torch.zeros(784, 1, 28, 28, dtype=torch.uint8)
    images.reshape(784, 784)[torch.arange(784), torch.arange(784)] = 255
    assert fingerprints(images).unique().numel() == 784
    assert fingerprints(torch.arange(100_000)[:, None]).unique().numel() == 100_000


def test_type_and_sign_of_zero_do_not_matter():
    x = torch.tensor([[0.0, 1.5]])
    assert torch.equal(fingerprints(x), fingerprints(torch.tensor([[-0.0, 1.5]])))
    assert torch.equal(fingerprints(x), fingerprints(x.double()))
    wide = torch.tensor([[1.0, 9, 2], [3, 9, 4]])
    assert torch.equal(fingerprints(wide[:, ::2]), fingerprints(wide[:, ::2].contiguous()))


def test_several_inputs_are_one_row():
    a, b = torch.randn(2, 30, 4)
    both = fingerprints((a, b))
    assert both.unique().numel() == 30
    assert not torch.equal(both, fingerprints((b, a)))
    assert torch.equal(both, fingerprints({"x": a, "z": b}))
    assert fingerprints(torch.zeros(0, 3)).shape == (0,)
    with pytest.raises(ValueError, match="no input"):
        fingerprints(())
