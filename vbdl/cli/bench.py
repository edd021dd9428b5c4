"""The command `vbdl bench`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vbdl.methods import building


@dataclass(frozen=True)
class Bench:
    """Train and score methods on benchmark data and compare them with published tables; resume an interrupted run.

    Each result is a JSON line in OUT/results.jsonl. `vbdl report OUT` makes an HTML page of a run; `vbdl compare`
    compares two runs."""

    out: Path = Path("vbdl-bench")
    """Folder of the run. Results that are already in it are not computed again."""
    suite: str = "bundled"
    """bundled (no download), uci, images, medical, credit, quality (the last four together), trained (the sets on which
    methods for trained networks are compared) or own (from --plugin)."""
    sets: tuple[str, ...] = ()
    """Names of data sets, instead of a suite."""
    methods: tuple[str, ...] = tuple(building())
    """Names of methods; linear and single are baselines. deterministic, temperature, laplace, laplace-all,
    laplace-validation and swag start from the same trained network, which a run trains once."""
    data: Path | None = field(default_factory=lambda: Path(p) if (p := os.environ.get("VBDL_DATA")) else None)
    """Folder of data sets; VBDL_DATA unless given. Missing files are downloaded from OpenML."""
    network: bool = True
    """Download missing files from OpenML."""
    protocol: str = "2016"
    """Protocol on UCI sets: MC dropout's of 2016 (400 epochs) or 2018 (4000 epochs), or own, without a published one:
    every method trains the same network by the same recipe."""
    plugin: tuple[Path, ...] = ()
    """Python files that register data sets and methods of your own. Their code is run."""
    seed: int = 0
    """Seed of initializations, orders of the data and draws: the same seed gives the same numbers."""
    effort: float = 1.0
    """Fraction of the epochs to train; 0.05 for a quick look."""
    samples: int | None = None
    """Draws in evaluation; the method's own number unless given."""
    rows: int | None = None
    """Largest number of training rows, and of test rows, of a split; all unless given."""
    splits: int | None = None
    """Number of splits: the first ones of a data set; if it has fewer, they repeat with other initializations."""
    hold_out: float = 0.0
    """Share of the training rows that only calibration sees; temperature and laplace-validation need some, like 0.1."""
    threads: int = 1
    """Number of threads that torch uses; 0 leaves the choice to torch."""
    scaling: bool = False
    """Also measure how the time of a prediction grows with draws, members, width, batch and rows, and its memory with
    draws. This compiles, which takes minutes."""
    list: bool = False
    """Print the data sets and methods, and train nothing."""

    def __call__(self) -> None:
        import torch

        from vbdl.bench import registry
        from vbdl.bench.protocols import OWN, PROTOCOLS
        from vbdl.bench.runner import Suite, SuiteSettings
        from vbdl.bench.source import Source

        registry.load_builtin()
        for path in self.plugin:
            registry.load_plugin(path)
        if self.list:
            for kind, entries in (("data sets", registry.DATASETS), ("methods", registry.METHODS)):
                print(f"{kind}:")
                for e in entries.values():
                    print(f"  {e.name:15} {e.suite:8} {e.about}")
            return
        if self.threads < 0:
            raise ValueError(f"threads is 0 or more, got {self.threads}")
        if self.protocol not in (*PROTOCOLS, OWN):
            raise ValueError(f"the protocol is one of {', '.join((*PROTOCOLS, OWN))}, not {self.protocol!r}")
        if self.threads:
            torch.set_num_threads(self.threads)
        suites = registry.suites()
        if not self.sets and self.suite not in suites:
            raise ValueError(f"there is no suite {self.suite!r}; there are {', '.join(suites)}")
        suite = Suite(
            self.out,
            self.sets or suites[self.suite],
            self.methods,
            Source(self.data, self.network),
            SuiteSettings(self.seed, self.effort, self.samples, self.protocol, self.rows, self.splits, self.hold_out),
            say=lambda text: print(text, flush=True),
        )
        results = suite.run()
        if self.scaling:
            from vbdl.bench.scaling import measure

            measure(self.out / "scaling.jsonl", say=lambda text: print(text, flush=True))
        failed = [r for r in results if "error" in r]
        print(f"{len(results) - len(failed)} results in {self.out}; `vbdl report {self.out}` makes a page of them")
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(results)} results failed; running again tries them again")
