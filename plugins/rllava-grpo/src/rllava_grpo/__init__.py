"""GRPO for rllava."""
