"""Our ops inside other trainers."""
