"""From text to the order of training windows: sources, a tokenizer, token shards and held-out sets."""
