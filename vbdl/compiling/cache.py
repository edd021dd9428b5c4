"""The folder of compiled code, checked before torch is imported: `import torch._dynamo` fails if it is a file."""

import getpass
import os
import re
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def give_place() -> None:
    """Choose a new folder for this process, with a warning, if a file is in the place of the one that torch would use.

    The folder is that of the environment variable TORCHINDUCTOR_CACHE_DIR, or torch's default.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        try:
            name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        except (KeyError, OSError, ImportError):  # a user without a name
            return
        folder = str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")
    if os.path.exists(folder) and not os.path.isdir(folder):
        import logging

        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="torchinductor_")
        logging.getLogger("vbdl").warning(
            "%s is not a folder, so compiled code of this process is kept in %s: set %s to a folder that can be "
            "written to, and later processes will find the compiled code there",
            folder,
            os.environ[VARIABLE],
            VARIABLE,
        )
