"""The models whose decoding is measured: what they differ in from the paper's 60 M-parameter configuration."""

from fibattn.training.recipe import PRESETS

HYBRID = PRESETS["hybrid"].model
LAYERS = HYBRID.num_hidden_layers
KINDS = ["full_attention" if layer in HYBRID.full_layers else "fibonacci_attention" for layer in range(LAYERS)]
_UNBOUNDED = {
    "window": HYBRID.window,
    "layer_types": KINDS,
    "no_rope_layers": [int(kind != "full_attention") for kind in KINDS],
}
MODELS: dict[str, dict[str, object]] = {
    "linear stagger, W = 12": {},
    "hybrid": {**_UNBOUNDED, "full_reach": PRESETS["hybrid"].length - 1},
    "hybrid without its bound": _UNBOUNDED,
    "dense": {"layer_types": ["full_attention"] * LAYERS},
}
