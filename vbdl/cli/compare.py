"""The command `vbdl compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

WORSE = 3  # exit code


@dataclass(frozen=True)
class Compare:
    """Compare two runs of `vbdl bench`: which scores became better or worse by more than chance, in paired tests.

    Exit code 0 if no score became worse, 3 if one did, 1 for an error."""

    before: Annotated[Path, tyro.conf.Positional]
    """Folder of the first run."""
    after: Annotated[Path, tyro.conf.Positional]
    """Folder of the second run."""
    alpha: float = 0.05
    """Probability of reporting any difference if there is none, over all tests together (Holm's correction)."""
    all: bool = False
    """Also print the scores without a difference."""

    def __call__(self) -> None:
        from vbdl.report.comparison import compare_runs
        from vbdl.report.run import StoredRun

        comparison = compare_runs(StoredRun.read(self.before), StoredRun.read(self.after), self.alpha)
        better, worse, same = (comparison.with_verdict(w) for w in ("better", "worse", "no difference found"))
        untested = [c for c in comparison.changes if c.verdict is None]
        shown = [*worse, *better, *(same + untested if self.all else [])]
        if shown:
            print(f"{'set':15} {'method':14} {'score':14} {'before':>10} {'after':>10}  verdict")
        for c in shown:
            v = c.verdict
            verdict = "not tested" if v is None else f"{v.word}, adjusted p {v.p_value:.2g} over {v.n} {c.over}"
            print(f"{c.dataset:15} {c.method:14} {c.metric:14} {c.before:10.5g} {c.after:10.5g}  {verdict}")
        print(
            f"{len(better)} scores better, {len(worse)} worse, {len(same)} without a difference at {self.alpha:g} "
            f"over all {len(better) + len(worse) + len(same)} tests; {len(untested)} cannot be paired."
        )
        for pairs, where in ((comparison.only_before, self.before), (comparison.only_after, self.after)):
            if pairs:
                print(f"only in {where}: " + ", ".join(f"{d} with {m}" for d, m in pairs))
        if worse:
            raise SystemExit(WORSE)
