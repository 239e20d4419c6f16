"""Compilers: from a piece and a region to something that runs. One file per backend."""
