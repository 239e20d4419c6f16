"""Benchmarks: workloads, engines in processes of their own, and one harness that alternates them."""
