"""The command line: seal-engine and its verbs."""
