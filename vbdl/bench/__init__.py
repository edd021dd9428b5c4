"""The benchmark suite runs methods on data sets and compares the scores with published tables; seeded and resumable.

A data set or method of your own is one file with `@dataset` or `@method`, given to `vbdl bench --plugin FILE`.
"""

from vbdl.bench.protocols import Published as Published
from vbdl.bench.registry import dataset as dataset
from vbdl.bench.registry import method as method
from vbdl.bench.source import Source as Source
from vbdl.bench.task import Run as Run
from vbdl.bench.task import Stacked as Stacked
from vbdl.bench.task import Task as Task
