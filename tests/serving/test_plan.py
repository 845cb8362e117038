"""What a paged cache is to keep of every layer, without vLLM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

import fibattn.serving
from fibattn import FibAttnConfig
from fibattn.serving import plan

FIELDS = frozenset(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "rope_parameters"),
        *("rope_scales_all", "use_cache", "tie_word_embeddings", "hidden_act", "qk_norm", "attention_bias", "qkv_bias"),
        *("mlp_bias", "pad_token_id", "bos_token_id", "eos_token_id", "base", "schedule", "stagger_heads", "window"),
        *("rungs", "rung_reach", "max_offset", "layer_types", "no_rope_layers", "full_reach", "layer_limits"),
        *("converted_from", "layer_offsets", "gated_mlp", "head_gates", "value_embeddings", "embedding_skip"),
        *("zero_init_outputs", "autocast_residual"),
        *("blocks", "block_size", "block_reach", "block_rope", "block_anchor", "kv_convolution"),
    )
)
"""What the model for vLLM follows, may pass over, or has refused."""


def test_every_field_of_the_configuration_is_followed_or_refused() -> None:
    """Whoever adds a field teaches the model for vLLM, or has `check_engine` refuse it, and adds it here."""
    assert set(FibAttnConfig.__annotations__) == FIELDS
    tiny_models.config().check_engine("the model for vLLM")


@pytest.mark.parametrize("kind", sorted(tiny_models.KINDS))
@pytest.mark.parametrize("block", [16, 32, 128])
def test_no_layer_keeps_less_than_it_reads(kind: str, block: int) -> None:
    config = tiny_models.config(kind)
    found = plan.windows(config, block, chunk=64, longest=4096)
    for layer, window in enumerate(found):
        reach = config.layer_reach(layer)
        assert (window is None) == (reach is None)
        assert window is None or reach is None or window > reach


def test_layers_keep_their_own_reach_where_that_is_less() -> None:
    config = FibAttnConfig()
    reaches = [config.layer_reach(layer) or 0 for layer in range(16)]
    assert plan.windows(config, 16, chunk=512, longest=100_000) == [reach + 1 for reach in reaches]
    # In large blocks the reaches make no difference, and one window has fewer tables.
    assert plan.windows(config, 4096, chunk=512, longest=100_000) == [max(reaches) + 1] * 16


def test_rows_are_counted_in_blocks_and_groups() -> None:
    # 99 tokens before a chunk of 64 lie in at most 7 blocks of 32; four layers of one window are one group.
    assert plan.rows_held([100] * 4, 32, chunk=64, longest=10_000) == 4 * 7 * 32
    # Four layers of one window and three of another go in groups of four, one layer of them padding.
    assert plan.rows_held([100] * 4 + [10] * 3, 16, chunk=16, longest=10_000) == 4 * 9 * 16 + 4 * 3 * 16
    # What is not bounded keeps all, and is never longer than a request may be.
    assert plan.rows_held([None, 5000], 16, chunk=64, longest=1000) == 63 * 16 + 64 * 16


def test_the_package_does_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm"):
        fibattn.serving.register()


def test_a_vllm_that_lacks_what_the_plugin_needs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text('__version__ = "0.6.3"\n')
    command = [sys.executable, "-c", "import fibattn.serving as s; s.register()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "vLLM 0.6.3 is none of those that fibattn was tried with: tried are 0.32.0" in done.stderr
    assert re.search(r"InputError: vLLM 0.6.3 lacks what fibattn's plugin needs \(.*\); tried are 0.32.0", done.stderr)
