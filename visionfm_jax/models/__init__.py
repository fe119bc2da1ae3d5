"""Networks: mathematics alone, with no word of meshes, losses or foreign names."""
