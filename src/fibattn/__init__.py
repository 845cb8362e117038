"""Fixed-offset sparse attention."""
