"""What drives the whole stack from above to show what it did: the report of a trace, and what comes from there."""
