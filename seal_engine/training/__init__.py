"""Jobs to adapters."""
