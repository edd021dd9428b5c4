"""Plugins: Python files of a user's own that commands run first, so that they know the user's methods and data sets."""

import importlib
import importlib.util
import sys
from pathlib import Path

_LOADED: dict[str, Path] = {}  # the files that were loaded as plugins, by the name of their module


def load(path: Path) -> bool:
    """Import a Python file as the module of its name, with its folder first on the import path, as `python FILE` does.

    Classes of the file, and of files beside it, are then imported by name: to load a saved predictor, for instance.
    The file's code is executed: use files you trust. Returns False if it was loaded before. Raises FileNotFoundError if
    there is no such file, ValueError if it is not a Python file or its name is that of another module.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"the plugin file {path} does not exist")
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"{path} is not a Python file that can be imported: call it something like my_method.py")
    if _LOADED.get(name) == path:
        return False
    folder = str(path.parent)
    if name in _LOADED:
        sys.modules.pop(name, None)  # an earlier plugin of the same name
    elif (spec := importlib.util.find_spec(name)) is not None and (
        spec.origin is None or Path(spec.origin).resolve() != path
    ):
        raise ValueError(f"the plugin {path} has the name of the module {name!r} ({spec.origin}): rename the file")
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    importlib.import_module(name)
    _LOADED[name] = path
    return True
