"""PPO for rllava."""
