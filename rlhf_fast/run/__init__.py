"""What a run leaves behind: its folder, checkpoints, logs, curves, and how much memory it took."""
