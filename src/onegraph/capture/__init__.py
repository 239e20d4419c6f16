"""Capture: from a module and one example call to one full graph, with every assumption as data."""
