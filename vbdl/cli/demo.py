"""The command `vbdl demo`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Train MC dropout, mean-field and a deep ensemble on data that needs no download, and compare them.

    Prints a table, and saves figures and models."""

    out: Path = Path("vbdl-demo")
    """Folder for the figures and models."""
    seed: int = 1
    """Seed of the splits, the initializations and the draws."""
    tasks: tuple[str, ...] = ("breast cancer", "digits", "diabetes")
    """Data sets to use."""
    effort: float = 1.0
    """Fraction of the epochs to train; 0.1 for a quick look."""
    timing: bool = True
    """Measure rows per second; this compiles each predictor."""
    threads: int = 1
    """Number of threads that torch uses; 0 leaves the choice to torch. Small networks do not gain from more than 1."""

    def __call__(self) -> None:
        import torch

        from vbdl.demo.run import run

        if self.threads < 0:
            raise ValueError(f"threads is 0 or more, got {self.threads}")
        if self.threads:
            torch.set_num_threads(self.threads)
        run(self.out, self.seed, self.tasks, self.effort, self.timing)
