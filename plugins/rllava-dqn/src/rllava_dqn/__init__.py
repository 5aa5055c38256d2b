"""DQN for rllava."""
