"""The optimiser: schedule and AdamW chain."""
