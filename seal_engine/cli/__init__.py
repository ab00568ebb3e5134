"""The command line: seal-engine and its verbs. Importing it sets how torch's threads wait, unless torch is loaded."""

from seal_engine.cli.threads import limit_spinning

limit_spinning()
