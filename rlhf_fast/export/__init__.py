"""A trained model for other programs: a GGUF file, a Modelfile, a Hugging Face folder in another dtype."""
