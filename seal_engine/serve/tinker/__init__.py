"""The Tinker API (/api/v1): models that clients train, step by step, over this server's worker; docs/tinker.md."""
