"""Measurements on held-out data."""
