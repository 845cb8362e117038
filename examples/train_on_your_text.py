"""From text to a model that writes: prepare, train, evaluate, generate. A run that is stopped goes on when repeated.

python examples/train_on_your_text.py                    # this package's own source, for a few seconds
python examples/train_on_your_text.py OUT TEXT           # your file or folder, into the folder OUT
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

import fibattn
from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.sources import parse_source
from fibattn.evaluation.sweep import sweep
from fibattn.model.loading import load_model
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import train

out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
text = sys.argv[2] if len(sys.argv) > 2 else str(Path(fibattn.__file__).parent)

source = parse_source(f"mine={text}")
data = prepare(out / "data", Plan((source,), vocab_size=512, held_out=0.1, held_out_tokens=8192))

recipe = Recipe(
    data=out / "data",
    out=out / "run",
    model=ModelRecipe(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4),
    optimizer=OptimizerRecipe(learning_rate=5e-3, warmup_steps=10),
    sequence_length=64,
    sequences_per_step=8,
    micro_batch=8,
    steps=50,  # more makes it better: this is not enough for words
    save_every=25,
)
folder = train(recipe)

model = load_model(folder)
result = sweep(model, data, lengths=[64, 256], sets=[], tokens=4096, quiet=True)
for length, row in result["sets"]["mine"].items():
    print(f"held-out text in sequences of {length}: perplexity {row['perplexity']:.1f}")

tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("def ", return_tensors="pt").to(model.device)
torch.manual_seed(0)
written = model.generate(**prompt, do_sample=True, temperature=0.7, max_new_tokens=60)  # pyright: ignore
print(tokenizer.decode(written[0]))
print(f"\nthe model, its tokenizer and its card are in {folder}")
