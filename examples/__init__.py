"""Short programs, and the demonstration."""
