"""Convert a loaded decoder to fixed-offset attention, generate with it, and put its own attention back.

python examples/convert_a_decoder.py            # a small random Llama, nothing to download
python examples/convert_a_decoder.py MODEL      # the folder or hub name of a Llama, Qwen, Gemma, ... of yours
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fibattn

model: Any
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    ids = tokenizer("The river rose all night, and in the morning", return_tensors="pt").input_ids
else:
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, eos_token_id=None, pad_token_id=0, **sizes)).eval()
    tokenizer = None
    ids = torch.tensor([list(b"The river rose all night, and in the morning")])

with torch.no_grad():
    own = model(ids).logits
    fibattn.convert(model, window=ids.shape[1])
    print(f"a window as long as the input: logits differ by {(model(ids).logits - own).abs().max():.1e}")
    fibattn.restore(model)

    # Every layer looks back 12 tokens, and to Fibonacci distances up to 100; the first keeps its own attention.
    fibattn.convert(model, window=12, max_offset=100, keep_layers=[0])
    for layer, offsets in enumerate(model.config.fibattn_pattern["layer_offsets"]):
        print(f"layer {layer}: {'as it was' if offsets is None else f'0 ... 12, {offsets}'}")
    print(f"the sparse pattern: logits differ by {(model(ids).logits - own).abs().max():.1e}")

    out = model.generate(ids, max_new_tokens=300, do_sample=True, return_dict_in_generate=True)
    print("tokens in the cache of each layer:", [layer.keys.shape[2] for layer in out.past_key_values.layers])
    print(tokenizer.decode(out.sequences[0]) if tokenizer else out.sequences[0, ids.shape[1] :].tolist()[:20])

    fibattn.restore(model)
    print(f"restored: logits differ by {(model(ids).logits - own).abs().max():.1e}")
