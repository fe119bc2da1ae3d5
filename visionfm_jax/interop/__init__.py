"""How other libraries name and lay out a model's weights, and nothing else: pure functions of NumPy arrays."""
