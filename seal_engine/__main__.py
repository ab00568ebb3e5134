"""`python -m seal_engine`: the command line."""

import sys

from seal_engine.cli.main import main

sys.exit(main())
