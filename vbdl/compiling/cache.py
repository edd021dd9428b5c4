"""The folder of compiled code, checked before torch is imported: `import torch._dynamo` fails if it is a file."""

import getpass
import os
import re
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def folder() -> str | None:
    """The folder of the environment variable TORCHINDUCTOR_CACHE_DIR, or torch's default; None for a nameless user."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return given
    try:
        name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError, ImportError):
        return None
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")


def give_place() -> None:
    """Choose a new folder of compiled code for this process, with a warning, if a file is in the folder's place."""
    place = folder()
    if place is not None and os.path.exists(place) and not os.path.isdir(place):
        import logging

        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="torchinductor_")
        logging.getLogger("vbdl").warning(
            "%s is not a folder, so compiled code of this process is kept in %s: set %s to a folder that can be "
            "written to, and later processes will find the compiled code there",
            place,
            os.environ[VARIABLE],
            VARIABLE,
        )
