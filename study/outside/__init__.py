"""Baselines from outside: other people's training programs, run as they are, on the text of the study."""
