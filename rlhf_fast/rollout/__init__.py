"""Sampling responses over a paged KV cache. rollout.py is the door, scheduler.py the loop."""
