"""Most tests of the plugin need vLLM, which wants an environment of its own: `make vllm-test`."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_vllm.py", "test_server.py"]
