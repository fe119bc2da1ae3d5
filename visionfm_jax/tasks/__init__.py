"""Objectives joined to networks: what one training step computes."""
