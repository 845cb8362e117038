"""Finds this model's classes in the installed package, `fibattn`.

`save_pretrained` puts this file beside the weights, so that programs that do not import `fibattn` (servers, evaluation
harnesses) can load the folder with `trust_remote_code=True`.
"""

try:
    from fibattn.model import *  # noqa: F403
except ImportError as error:
    # Transformers would say `pip install fibattn`, but that name on PyPI is not this package.
    raise ImportError(
        "this model needs the package fibattn, which is not on PyPI; the model card says where it is from: "
        "pip install PATH/TO/fibattn"
    ) from error
