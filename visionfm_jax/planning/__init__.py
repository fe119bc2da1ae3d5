"""What a run will need, from its compiled step: for clusters that are not there."""
