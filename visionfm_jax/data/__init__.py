"""Sources, transforms and loaders: from files to uint8 batches on the host."""
