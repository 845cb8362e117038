"""Sequences that are cut over several processes."""
