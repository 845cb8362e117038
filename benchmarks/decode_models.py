"""The models whose decoding is measured: what they differ in from the paper's 60 M-parameter configuration."""

from fibattn.training.recipe import PRESETS

HYBRID = PRESETS["hybrid"].model
LAYERS = HYBRID.num_hidden_layers
KINDS = ["full_attention" if layer in HYBRID.full_layers else "fibonacci_attention" for layer in range(LAYERS)]
MODELS: dict[str, dict[str, object]] = {
    "linear stagger, W = 12": {},
    "hybrid, W = 128": {
        "window": HYBRID.window,
        "layer_types": KINDS,
        "no_rope_layers": [int(kind != "full_attention") for kind in KINDS],
    },
    "dense": {"layer_types": ["full_attention"] * LAYERS},
}
