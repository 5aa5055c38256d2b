"""LLaVA for rllava."""
