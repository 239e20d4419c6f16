"""Configuration: what a user may ask for, and the effective values with the reason for each."""
