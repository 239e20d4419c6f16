"""One piece of a model alone, as a person looks at it: beside eager and fp64, and under a debugger."""
