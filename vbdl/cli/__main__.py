import sys

from vbdl.cli import main

sys.exit(main())
