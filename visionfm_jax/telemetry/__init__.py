"""What a person sees of a run: metric files, the progress bar, pictures, and an alarm when it is stuck."""
