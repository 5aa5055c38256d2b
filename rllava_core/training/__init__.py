"""The loop and what surrounds it: building the parts, episodes, evaluation, checkpoints, tracking."""
