"""One process that serves one engine: HTTP as vLLM and OpenAI have it, SEAL's inner loop on ZMQ (the extra `serve`)."""
