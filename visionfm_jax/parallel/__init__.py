"""Placement: meshes, ZeRO, process start, accelerator data sheets."""
