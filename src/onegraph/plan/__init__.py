"""Plan: from pieces to an ExecutionPlan, and from a plan to the Python function that runs it."""
