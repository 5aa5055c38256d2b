"""Gymnasium environments as tasks for vision-language models."""
