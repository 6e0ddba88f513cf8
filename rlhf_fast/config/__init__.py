"""Every setting: its fields, the stages' trees, presets, YAML and flags."""
