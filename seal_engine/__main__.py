"""`python -m seal_engine`: the command line."""

import sys

from seal_engine.cli import main

sys.exit(main())
