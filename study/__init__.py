"""The study of fixed-offset sparse attention: one paper's matrix of models, what came out, and how it was measured."""
