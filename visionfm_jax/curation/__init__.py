"""Look at data and choose among it: scores, duplicates, held-out images, and what is amiss."""
