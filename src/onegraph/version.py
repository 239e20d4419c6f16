"""The version of onegraph, where packaging and the artifacts' keys read it."""

__version__ = "0.1.0"
