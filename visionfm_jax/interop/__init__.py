"""Names and layouts of weights in other libraries, and nothing else: pure functions of NumPy arrays."""
