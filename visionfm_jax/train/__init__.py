"""The one trainer: state, step, checkpoints, loop."""
