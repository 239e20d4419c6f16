"""The nouns of the pipeline and the protocols between its stages; no stage lives here."""
