"""Measurements that are quoted in the documentation: the operator, decoding, a training step."""
