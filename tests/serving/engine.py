"""vLLM in a process of its own: `ask` starts this file as a program, which answers in one line.

The engine runs in that process (not in one more), where its scheduler's blocks can be counted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "OMP_NUM_THREADS": "1"}


def ask(folder: Path, rounds: list[list[list[int]]], new: int, environment: Any = None, **how: Any) -> dict[str, Any]:
    """Greedy answers of one engine to rounds of prompts, and the most blocks that a request held in each group.

    `how` are an engine's options, and `adapter` a folder of one, which answers in place of the model alone.
    """
    task = json.dumps({"folder": str(folder), "rounds": rounds, "new": new, "how": how})
    command = [sys.executable, __file__, task]
    given = {**os.environ, **ENVIRONMENT, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"'))
    return {**json.loads(answer), "log": done.stdout + done.stderr}


def _answer(folder: str, rounds: list[list[list[int]]], new: int, how: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    adapter = how.pop("adapter", None)
    more = {} if adapter is None else {"lora_request": LoRARequest("adapter", 1, adapter)}
    sizes = {"max_model_len": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 32}
    sizes = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, **sizes, **how}
    llm = LLM(folder, kv_cache_memory_bytes=64 << 20, skip_tokenizer_init=True, **sizes)
    held: dict[int, int] = {}
    one_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    if one_process:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        _count(scheduler, held)
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    tokens, cached = [], []
    for prompts in rounds:
        found = llm.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], greedy, use_tqdm=False, **more)
        tokens.append([list(one.outputs[0].token_ids) for one in found])
        cached.append([one.num_cached_tokens for one in found])
    answer: dict[str, Any] = {"tokens": tokens, "cached": cached, "held": held}
    if one_process:
        manager = scheduler.kv_cache_manager
        answer["free"] = manager.block_pool.get_num_free_blocks() - manager.kv_cache_config.num_blocks
        specs = [one.kv_cache_spec for one in manager.kv_cache_config.kv_cache_groups]
        answer["windows"] = [getattr(one, "sliding_window", None) for one in specs]
    return answer


def _count(scheduler: Any, held: dict[int, int]) -> None:
    schedule, managers = scheduler.schedule, scheduler.kv_cache_manager.coordinator.single_type_managers

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        for request in out.num_scheduled_tokens:
            for group, manager in enumerate(managers):
                blocks = sum(not one.is_null for one in manager.req_to_blocks[request])
                held[group] = max(held.get(group, 0), blocks)
        return out

    scheduler.schedule = counted


if __name__ == "__main__":
    print("\n" + json.dumps(_answer(**json.loads(sys.argv[1]))))
