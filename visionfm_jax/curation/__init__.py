"""Looking at, scoring and choosing training data: what needs models, or pictures for people."""
