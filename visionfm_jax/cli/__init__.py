"""What `main` does, from a configuration to an exit code: train, evaluate, replay."""
