"""OpenAI-compatible endpoints for rllava: an engine that evaluates hosted models, and a reward that asks a judge."""
