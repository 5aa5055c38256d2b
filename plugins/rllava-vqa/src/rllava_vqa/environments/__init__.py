"""Environments of visual question answering: looking again before the answer."""
