"""Weights that are cut over processes (FSDP2): in which dtype they are gathered, and how their layers are compiled."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from fibattn.model.layer import LearnedScale


def narrow(model: nn.Module, plugin: Any, device: str) -> None:
    """Autocast a model to bfloat16, gather its weights in that, and add gradients up in float32.

    accelerate has no autocast for what it shards. Its own choice casts all that goes in and comes out instead, so that
    a loss has eight bits, and adds gradients up in bfloat16. A learned scale needs all its bits: with one, weights are
    gathered in float32.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, before the model is prepared.
        device: the type of the device that the model runs on.
    """
    learned = any(isinstance(one, LearnedScale) and one.theta is not None for one in model.modules())
    gathered = None if learned else torch.bfloat16
    plugin.mixed_precision_policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile the layers of a decoder around their attention, and the loss.

    A model whose layers wait for their weights cannot be one graph. A graph for each layer would belong to its
    distances, and after eight PyTorch gives up and runs the others as they are; without the attention, an operator of
    its own in any case, all layers share a few.
    """
    for layer in model.model.layers:
        # Not the call, which gradient checkpointing would keep from being compiled.
        layer.forward = torch.compile(layer.forward, backend=backend)
        layer.self_attn.attend = torch.compiler.disable(layer.self_attn.attend)
    model._summed_loss = torch.compile(model._summed_loss, backend=backend)
