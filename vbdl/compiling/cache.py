"""Where compiled code is kept, before torch is imported: what is no folder there ends `import torch._dynamo`."""

import getpass
import os
import re
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def give_place() -> None:
    """Choose a new folder for this process where the one that torch would take is a file, and say so."""
    given = os.environ.get(VARIABLE)
    if given is None:
        try:
            name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        except (KeyError, OSError, ImportError):  # a user without a name
            return
        given = str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")
    if os.path.exists(given) and not os.path.isdir(given):
        import logging

        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="torchinductor_")
        logging.getLogger("vbdl").warning(
            "%s is no folder, so compiled code of this process is kept in %s: set %s to a folder that can be "
            "written to, and the next process finds it again",
            given,
            os.environ[VARIABLE],
            VARIABLE,
        )
