"""What drives the whole stack from above to look at it: one piece alone, and the report of a trace."""
