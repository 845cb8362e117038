"""The benchmark of the operator: the same work by several providers, checked first, then timed. Knows no models."""
