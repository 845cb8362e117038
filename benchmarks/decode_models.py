"""The models whose decoding is measured, of the paper's 60 M-parameter shape: those of the latency probe, and the
default recipe without its bound."""

from fibattn import FibAttnConfig
from fibattn.training.recipe import DEFAULT, PRESETS
from fibattn.training.run import model_config
from study.probes.latency import models

_timed = models()
MODELS: dict[str, FibAttnConfig] = {
    "linear stagger, W = 12": _timed["static"],
    "hybrid": _timed["hybrid"],
    "hybrid without its bound": model_config(PRESETS[DEFAULT], FibAttnConfig.vocab_size, separator=0),
    "dense": _timed["dense"],
}
