"""The work of `main`, from a configuration to an exit code: train, evaluate, replay."""
