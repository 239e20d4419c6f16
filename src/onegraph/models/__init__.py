"""Models: transformers' own decoder-only classes and weights, called on a flat batch through our attention."""

from __future__ import annotations

from pathlib import Path

from onegraph.models.flat_model import FlatModel
from onegraph.models.loader import KVLayout, LoadedModel, load_model

BUILTIN_MODEL = Path(__file__).parent / "builtin"
"""The small model that ships with onegraph."""

__all__ = ["BUILTIN_MODEL", "FlatModel", "KVLayout", "LoadedModel", "load_model"]
