"""What jaxent is measured by. `python -m benchmarks` runs it; README.md says what and why."""
