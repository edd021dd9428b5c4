"""Whether a network might call dropout, judged without running it."""

import inspect
import sys

from torch import nn

DROPOUT_LAYERS = (nn.modules.dropout._DropoutNd,)


def is_part_of_torch(module: nn.Module) -> bool:
    """Whether torch defines the module's class and all its base classes."""
    return all(c.__module__.partition(".")[0] in ("torch", "builtins", "typing") for c in type(module).__mro__)


def may_drop(module: nn.Module) -> bool:
    """Whether a forward might call dropout, judged by its layers and source code, without running it."""
    for m in module.modules():
        if isinstance(m, DROPOUT_LAYERS) or getattr(m, "dropout", None):
            return True
        hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
        homes = [type(m).__module__] if not is_part_of_torch(m) or "forward" in vars(m) else []
        for home in [*homes, *(getattr(getattr(hook, "func", hook), "__module__", "") for hook in hooks)]:
            try:
                # the whole file, because a forward may call functions of its file
                if "drop" in inspect.getsource(sys.modules[home]).lower():
                    return True
            except (OSError, TypeError, KeyError):
                return True  # without source, only running the module can tell
    return False
