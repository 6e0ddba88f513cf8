"""The three stages, each a file with `run(cfg)`, and recipe.py, which runs them in order."""
