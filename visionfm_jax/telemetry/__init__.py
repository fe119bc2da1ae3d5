"""Telemetry, for people: metric files, the progress bar, pictures, and an alarm when a run is stuck."""
