"""Scripts that each answer the question in their first line: python -m benchmarks.NAME --help."""
