"""vLLM for rllava."""
