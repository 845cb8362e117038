"""Text in, windows of tokens out: sources, tokenizer, shards, the order of training windows."""
