"""Text without end: the time of a token and the memory stay the same, however long the text becomes.

python examples/stream_without_end.py            # a small random model, some hundred tokens
python examples/stream_without_end.py MODEL      # a trained one, until it is interrupted
"""

import itertools
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fibattn import FibAttnConfig, FibAttnForCausalLM
from fibattn.model.streaming import pieces, stream

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    for text in pieces(tokenizer, stream(model, [tokenizer.bos_token_id], temperature=0.8)):
        print(text, end="", flush=True)

torch.manual_seed(0)
config = FibAttnConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_offset=255
)
model = FibAttnForCausalLM(config).eval()
reaches = [config.layer_reach(layer) for layer in range(config.num_hidden_layers)]
print(f"its layers look back {reaches} tokens, so that is all the cache must hold")

tokens = stream(model, [0], seed=0)
for part in range(1, 4):
    began = time.perf_counter()
    written = list(itertools.islice(tokens, 500))
    spent = time.perf_counter() - began
    print(f"after {500 * part:,} tokens: {1000 * spent / len(written):.2f} ms a token; the last are {written[-5:]}")
tokens.close()
