"""A scale model of the InstructGPT experiment: a small generated world, its labelers, and the three stages on top."""
