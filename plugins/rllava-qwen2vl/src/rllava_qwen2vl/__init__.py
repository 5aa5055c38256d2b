"""Qwen2-VL for rllava."""
