"""DataLoaders of every kind: with workers, of dicts, and of streams without a length."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import vbdl

ROWS = 50


class Texts(nn.Module):
    """A classifier of token ids, called as transformers' models are."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.out = nn.Embedding(20, 8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.out(self.drop((self.embed(input_ids) * attention_mask.unsqueeze(-1)).mean(1)))}


class Sentences(Dataset):
    """Rows as dicts, like a dataset of Hugging Face in torch's format."""

    def __init__(self, targets="labels"):
        ids = torch.randint(20, (ROWS, 6), generator=torch.Generator().manual_seed(0))
        self.columns = {"input_ids": ids, "attention_mask": (ids > 2).long(), targets: ids.sum(1) % 3}

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Numbered(Dataset):
    """Rows whose inputs are drawn by the worker that reads them, if they are augmented."""

    def __init__(self, augmented=False):
        self.x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        self.augmented = augmented

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(4) if self.augmented else 0.0
        return self.x[index] + noise, int(self.x[index, 0] > 0)


class Stream(IterableDataset):
    def __init__(self, exhausted=False):
        self.exhausted = iter(self) if exhausted else None

    def __iter__(self):
        if getattr(self, "exhausted", None) is not None:
            return self.exhausted
        x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        return iter([(row, int(row[0] > 0)) for row in x])


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def trained(data, make=lambda: vbdl.DeepEnsemble(network(), 2), **options):
    torch.manual_seed(1)
    q = make()
    options = {"epochs": 3, "batch_size": 16, "progress": False, "compile": False, **options}
    history = vbdl.fit(q, data, vbdl.Categorical(), **options)
    return q, history


def the_same(a, b):
    assert all(torch.equal(s, t) for s, t in zip(a[0].state_dict().values(), b[0].state_dict().values(), strict=True))
    assert a[1].train_loss == b[1].train_loss and torch.equal(a[0].training_rows, b[0].training_rows)


# processes of workers end after the test that started them; what they leave unread is none of its
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_yield_what_the_process_itself_does(options):
    alone, workers = (DataLoader(Numbered(), batch_size=16, shuffle=True, **o) for o in ({}, options))
    the_same(trained(workers), trained(alone))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("augmented", "persistent"), [(True, False), (False, True)])
def test_what_workers_draw_follows_from_the_seed_and_the_epoch(augmented, persistent, tmp_path):
    """A training that resumes gives the bits of an uninterrupted one, though its rows are augmented at random."""
    loader = lambda: DataLoader(
        Numbered(augmented), batch_size=16, shuffle=True, num_workers=2, persistent_workers=persistent
    )
    whole = trained(loader(), epochs=4)
    trained(loader(), epochs=2, checkpoint=tmp_path / "c")
    resumed = trained(loader(), epochs=4, checkpoint=tmp_path / "c")
    assert resumed[1].train_loss == whole[1].train_loss
    assert trained(loader(), epochs=4, seed=1)[1].train_loss != whole[1].train_loss


@pytest.mark.parametrize("targets", ["labels", "label", "targets", "target"])
def test_batches_may_be_dicts_with_targets(targets):
    pairs = [({n: t for n, t in batch.items() if n != "labels"}, batch["labels"])
             for batch in DataLoader(Sentences(), batch_size=16)]  # fmt: skip
    texts = lambda: vbdl.MCDropout(Texts())
    of_pairs = trained(DataLoader(pairs, batch_size=None), texts)
    the_same(trained(DataLoader(Sentences(targets), batch_size=16), texts), of_pairs)
    # a Dataset of dicts is one of its rows
    rows = Sentences().columns
    of_rows = trained(({n: t for n, t in rows.items() if n != "labels"}, rows["labels"]), texts)
    the_same(trained(Sentences(targets), texts), of_rows)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (("input_ids", "classes"), "got a dict of .'input_ids', 'classes'.: rename the entry .* to 'labels'"),
        (("input_ids", "label", "target"), "take the other away, as both .'label', 'target'. are there"),
        (("labels",), "inputs beside the targets 'labels'"),
    ],
)
def test_a_dict_without_one_clear_target_is_refused(entries, says):
    batch = dict.fromkeys(entries, torch.arange(6) % 3)
    with pytest.raises(TypeError, match=says):
        trained(DataLoader([batch], batch_size=None), lambda: vbdl.MCDropout(Texts()))


def test_an_entry_that_the_network_does_not_take_is_named():
    class Indexed(Sentences):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "idx": index}

    with pytest.raises(ValueError, match="'idx'.*leave out"):
        trained(DataLoader(Indexed(), batch_size=16), lambda: vbdl.MCDropout(Texts()))


def test_a_collection_of_another_kind_is_sent_to_a_loader():
    class Table:
        def __len__(self):
            return 3

    with pytest.raises(TypeError, match="got Table: put other collections, .* into a DataLoader"):
        trained(Table())


def test_streams_without_a_length_train_as_their_rows(caplog):
    stream, rows = DataLoader(Stream(), batch_size=16), DataLoader(list(Stream()), batch_size=16)
    for options in ({"schedule": "cosine"}, {"validation": (torch.randn(9, 4), torch.arange(9) % 3), "patience": 2}):
        the_same(trained(stream, **options), trained(rows, **options))
    swag = lambda: vbdl.SWAG(network(), 2)
    the_same(trained(stream, swag, epochs=4), trained(rows, swag, epochs=4))


def test_a_stream_that_is_exhausted_is_refused():
    with pytest.raises(ValueError, match="no batch in epoch 1: .* begins anew in every epoch"):
        trained(DataLoader(Stream(exhausted=True), batch_size=16))


def test_targets_of_a_collate_function_may_be_arrays():
    collate = lambda rows: (torch.stack([x for x, _ in rows]).numpy(), [y for _, y in rows])
    one = trained(DataLoader(Numbered(), batch_size=16, collate_fn=collate))
    the_same(one, trained(DataLoader(Numbered(), batch_size=16)))
