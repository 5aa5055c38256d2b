"""Readers of visual questions: a built-in set, a JSONL file, a folder of classes."""
