"""Recordings of compiled graphs: what is recorded, which memory it relies on, and when it is replayed."""
