"""Dense and staggered attention on texts longer than those they were trained on.

python examples/extrapolate.py          # a short training, on this package's own source
python examples/extrapolate.py 900      # more steps (`make demo` shows it with larger models)
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import fibattn
from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.sources import parse_source
from fibattn.evaluation.sweep import sweep
from fibattn.model.loading import load_model
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from fibattn.training.run import train

out = Path(tempfile.mkdtemp())
source = parse_source(f"source={Path(fibattn.__file__).parent}")
data = prepare(out / "data", Plan((source,), vocab_size=512, held_out=0.1, held_out_tokens=8192))

shape = ModelRecipe(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
recipe = Recipe(
    data=out / "data",
    model=shape,
    optimizer=OptimizerRecipe(learning_rate=1e-2, warmup_steps=10),
    sequence_length=32,
    sequences_per_step=16,
    micro_batch=16,
    steps=int(sys.argv[1]) if len(sys.argv) > 1 else 200,
)
lengths = [32, 64, 128, 256]
results = {}
for attention in ("full_attention", "fibonacci_attention"):
    run = replace(recipe, out=out / attention, model=replace(shape, layer_types=(attention,)))
    results[attention] = sweep(load_model(train(run)), data, lengths=lengths, sets=[], tokens=4096, quiet=True)

print("\nperplexity of held-out text in sequences of", ", ".join(map(str, lengths)), "tokens:")
for attention, result in results.items():
    print(f"{attention:>10}", *(f"{row['perplexity']:7.1f}" for row in result["sets"]["source"].values()))
print("Both were trained on sequences of 32.")
