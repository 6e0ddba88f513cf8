"""Judges of answers: refusal, toxicity, truth, informativeness and preference."""
