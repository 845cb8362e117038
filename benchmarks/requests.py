"""Requests in the middle of their answers, and the steps that they share.

Transformers' manager is given requests that have had their prompts already: their part of the cache is theirs, with
whatever stands there, and the next step draws a token for each.
"""

import inspect
import statistics
from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import RequestStatus

from benchmarks.decoders import bandwidth_of, clear, configurations, least_bytes
from fibattn import FibAttnForCausalLM

_PAGE, _WARM = 32, 10
_PAGE_NAME = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"

Row = dict[str, Any]


def throughput(name: str, context: int, requests: int, steps: int, device: str) -> Row:
    """Tokens a second of all requests, and the milliseconds of a step: the median of those after the first ten."""
    bandwidth = bandwidth_of(device)
    clear(device)
    torch.manual_seed(0)
    config = configurations()[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = FibAttnForCausalLM(config).to(device, dtype).eval()  # pyright: ignore
    reaches = [config.layer_reach(layer) for layer in range(config.num_hidden_layers)]
    # Memory for all: where no layer is bounded, all of the text.
    kept = max(context + steps if reach is None else reach + 1 for reach in reaches)
    pages = requests * (-(-kept // _PAGE) + 1)
    sizes: dict[str, Any] = {
        _PAGE_NAME: _PAGE,
        "num_blocks": pages,
        "max_batch_tokens": requests,
        "max_requests_per_batch": requests,
    }
    greedy = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0)
    how: dict[str, Any] = {"generation_config": greedy, "continuous_batching_config": ContinuousBatchingConfig(**sizes)}
    manager = model.init_continuous_batching(**how)
    create = manager._create_batch_processor

    def created() -> Any:
        processor = create()
        processor.scheduler.add_waiting_request = lambda state: _go_on(processor.scheduler, state, context)
        return processor

    manager._create_batch_processor = created
    for one in range(requests):
        manager.add_request([one + 1], max_new_tokens=steps, record_timestamps=True, eos_token_id=-1)
    manager.start()
    found = []
    while len(found) < requests:
        output = manager.get_result(timeout=600)
        if output is None or output.error is not None:
            raise RuntimeError(f"{name} at {context} tokens: {'no answer' if output is None else output.error}")
        found.append(output)
    manager.stop(block=True)
    times = [one.timestamps[_WARM:] for one in found]
    spans = [after - before for one in times for before, after in pairwise(one)]
    step = statistics.median(spans)
    return {
        "model": name,
        "context": context,
        "requests": requests,
        "step_ms": step * 1e3,
        "tokens_per_second": requests / step,
        "least_ms": least_bytes(model, context, requests) / bandwidth * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _go_on(scheduler: Any, state: Any, context: int) -> None:
    """A new request as one that has had `context` tokens less one, and is to read the last of them."""
    if hasattr(scheduler.cache, "can_store_request_tokens"):
        stored = scheduler.cache.can_store_request_tokens(state, context)
    else:
        state.allocated_blocks = scheduler.cache.allocate_blocks(-(-context // _PAGE), state.request_id, 0)
        stored = state.allocated_blocks is not None
    if not stored:
        raise RuntimeError(f"the cache has no room for {context} tokens of {state.request_id}")
    state.position_offset = context - 1
    state.tokens_to_process, state.remaining_prefill_tokens = state.initial_tokens, []
    state.status = RequestStatus.DECODING
    scheduler.active_requests[state.request_id] = state


def line_of(row: Row) -> str:
    """A row in words."""
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**20:,.0f} MiB"
    who = f"{row['model']}, {row['requests']} requests at {row['context']:,} tokens"
    speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['step_ms']:.2f} ms a step"
    return f"{who}: {speed}; reading what it must would take {row['least_ms']:.2f} ms{peak}"
