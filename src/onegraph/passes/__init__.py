"""Passes: named rewrites of a piece's graph, in order, each counted, checkable and switchable. One file per pass."""
