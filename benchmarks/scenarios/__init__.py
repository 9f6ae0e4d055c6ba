"""One module per benchmark: `python -m benchmarks.scenarios.<name>`."""
