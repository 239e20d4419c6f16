"""The store: artifacts on disk by key, verified when they are read, written so that no partial one is seen."""
