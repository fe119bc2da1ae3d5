"""Plans of runs on clusters that are not there, from the compiled step."""
