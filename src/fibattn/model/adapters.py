"""Made known to peft: which layers get an adapter whose configuration names none. They have Llama's names."""

from peft.utils import constants

from fibattn.model.configuration import FibAttnConfig

for _name, _table in vars(constants).items():
    if _name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in _table:
        _table.setdefault(FibAttnConfig.model_type, _table["llama"])
