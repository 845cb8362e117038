"""The verbs of `python -m study`, one thin file each."""
