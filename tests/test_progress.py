"""How long training lasts, as far as is known."""

import logging

import torch

from vbdl import progress
from vbdl.training.early_stopping import BestEpochs


def test_the_last_epoch_is_known_while_nothing_becomes_better():
    state = {"w": torch.zeros(2)}
    best = BestEpochs(2, patience=3, by_member={"w"})
    assert best.last(100) == 3
    nll = [(5.0, 5.0), (4.0, 6.0), (4.5, 6.0), (3.0, 6.0), (3.5, 1.0), (3.5, 1.0), (3.5, 1.0)]
    lasts = []
    for epoch, one in enumerate(nll):
        best.update(epoch, torch.tensor(one), state)
        lasts.append(best.last(100))
    # the second member stops after epoch 3; the first gains last in epoch 3, and waits for 3 more
    assert lasts == [4, 5, 5, 7, 7, 7, 7]
    assert best.done and BestEpochs(2, None, set()).last(100) == 100 and best.last(6) == 6


def test_the_time_that_is_left_is_that_of_the_steps_left_now(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, "vbdl"), progress.Progress("training", 500) as bar:
        for _ in range(40):
            clock[0] += 1
            bar.total = 60
            bar.advance()
    assert [record.getMessage().split(",")[1].strip() for record in caplog.records] == ["45 s left", "30 s left"]


def test_a_bar_takes_a_new_total(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    with progress.Progress("training", 500, shown=True) as bar:
        bar.advance()
        bar.total = 60
        bar.advance()
        assert bar._bar.tasks[0].total == 60
