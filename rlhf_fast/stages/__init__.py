"""The three stages. Each is a file with `run(cfg)`; recipe.py runs them in order."""
