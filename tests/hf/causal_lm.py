"""Transformers' own tests of a causal language model, on ours: `make hf-tests`.

They come from the sources of the installed version (`fetch.py`) and are no part of this repository. What those
sources lack is left out, and said. What is skipped, and why, is at the end.
"""

import sys
import types
import unittest
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from fetch import fetch
from packaging.version import Version
from torch import Tensor
from transformers.models.auto import modeling_auto

from fibattn import FibAttnConfig, FibAttnForCausalLM, FibAttnModel

SOURCES = fetch()
sys.path.insert(0, str(SOURCES))
# The tests look up by name what a class is for.
modeling_auto.MODEL_MAPPING_NAMES["fibattn"] = "FibAttnModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fibattn"] = "FibAttnForCausalLM"

MISSING: list[str] = []


def empty(name: str) -> type:
    """A class in the place of one that cannot be had."""
    if name.startswith("_"):
        raise AttributeError(name)
    return type(name, (), {})


def fetched(module: str) -> Any:
    """A module of the fetched tests; in the place of those that it imports and they lack there are empty classes."""
    while True:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("tests."):
                raise
            stand_in: Any = types.ModuleType(error.name)
            stand_in.__path__, stand_in.__getattr__ = [], empty
            sys.modules[error.name] = stand_in
            MISSING.append(error.name)


common = fetched("tests.test_modeling_common")
Common, Generation = common.ModelTesterMixin, common.GenerationTesterMixin


class SettableConfig(FibAttnConfig):
    """The tests set `sliding_window` where there is one; here it follows from the window, which stays."""

    @property
    def sliding_window(self) -> int:
        return self.window + 1

    @sliding_window.setter
    def sliding_window(self, value: int) -> None:
        pass


class Maker:
    """What the tests ask for their models and inputs."""

    is_training = True
    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    base_model_class, causal_lm_class = FibAttnModel, FibAttnForCausalLM

    def get_config(self) -> FibAttnConfig:
        return SettableConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            window=2,
            rungs=4,
            layer_types=["fibonacci_attention", "full_attention"],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FibAttnConfig, dict[str, Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class TestFibAttn(Common, Generation, unittest.TestCase):  # pyright: ignore
    all_model_classes = (FibAttnModel, FibAttnForCausalLM)
    all_generative_model_classes = (FibAttnForCausalLM,)
    model_tester_class = Maker
    pipeline_model_mapping: dict[str, type] = {}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = Maker()

    def test_config(self) -> None:
        if not (SOURCES / "tests" / "utils").exists():
            self.skipTest("the fetched sources lack the tests of configurations")
        tester = fetched("tests.test_configuration_common").ConfigTester
        tester(self, config_class=FibAttnConfig, hidden_size=32).run_common_tests()


SKIPPED = {
    "test_attention_outputs": "sparse layers never form the matrix of attention weights",
    "test_retain_grad_hidden_states_attentions": "sparse layers never form the matrix of attention weights",
    "test_bc_cache_name_forward": "past_key_values is not deprecated here: the oldest supported version uses it",
}
if "tests.generation" in MISSING:
    SKIPPED["test_generation_tester_mixin_inheritance"] = "the fetched sources lack the tests of generation"
if Version(transformers.__version__) < Version("5.24"):
    SKIPPED["test_model_rope_scaling_frequencies"] = "it calls the rotary embedding in a way that is no more"
for test, reason in SKIPPED.items():
    if hasattr(TestFibAttn, test):
        setattr(TestFibAttn, test, pytest.mark.skip(reason=reason)(getattr(TestFibAttn, test)))
