"""The models whose decoding is measured: what they differ in from the paper's 60 M-parameter configuration."""

LAYERS = 16
HYBRID = ["full_attention" if layer in (7, 15) else "fibonacci_attention" for layer in range(LAYERS)]
MODELS: dict[str, dict[str, object]] = {
    "linear stagger, W = 12": {},
    "hybrid, W = 128": {
        "window": 128,
        "layer_types": HYBRID,
        "no_rope_layers": [int(kind != "full_attention") for kind in HYBRID],
    },
    "dense": {"layer_types": ["full_attention"] * LAYERS},
}
