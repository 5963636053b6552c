"""The OpenAI-compatible server: requests in, documents to the engine, answers out. No model code."""
