"""The effect in five minutes: `python -m examples.demo`."""
