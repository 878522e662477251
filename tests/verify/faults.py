"""Faults to plant."""
FAULTS = {}
