"""From text to the order of training sequences: sources, a tokenizer, token shards and held-out sets."""
