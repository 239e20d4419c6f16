"""Split: from a captured graph to its pieces."""
