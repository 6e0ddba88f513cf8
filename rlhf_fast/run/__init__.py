"""A run's output: its folder, checkpoints, logs, curves and peak memory, and text for a terminal."""
