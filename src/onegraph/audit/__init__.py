"""The audit of keys: settings and captured values are changed one by one, and keys compared with what is compiled."""
