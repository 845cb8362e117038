"""What perplexity does not show: a function for each probe, in the module of its name, that gives plain JSON."""
