"""The command `vbdl info`."""

import os
from dataclasses import dataclass

import vbdl


@dataclass(frozen=True)
class Info:
    """Print versions, threads, devices and the compiler, for a bug report."""

    def __call__(self) -> None:
        import platform

        import torch

        from vbdl.compiling.compiler import can_compile

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        for name, value in {
            "vbdl": vbdl.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
            "C++ compiler": "found" if can_compile() else "none: predictions run uncompiled",
            "GPU": ", ".join(gpus) or "none",
        }.items():
            print(f"{name:<14} {value}")
