"""What is measured on one finished model, and written down of the machine it was trained on."""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import fibattn
from fibattn import files
from fibattn import machine as hardware
from fibattn.data.prepared import PreparedData
from fibattn.data.tokenizer import load_tokenizer, tokenizer_folder
from fibattn.evaluation.sweep import CONVENTION, sweep
from fibattn.model.loading import load_model
from study.cost import coverage, flops, mean_keys
from study.presets import RopeScaling, Study
from study.probes.copying import copying, distances
from study.probes.lego import lego
from study.probes.ruler import ruler
from study.probes.settings import Lego, Ruler
from study.turns import processes_a_gpu

_CURVE_POINTS = 60


def evaluate(folder: Path, data: PreparedData, study: Study, targets: dict[str, int]) -> dict[str, Any]:
    """What a finished model is, costs and does, as JSON values; `targets` of each held-out set.

    `evaluation` is the length sweep on every held-out set, `copying` the accuracy by distance. `ruler` and `lego` are
    the rows of the probes of these names, one for each length of the chain: `hops` or `length`, `accuracy`, `margin`
    and `margin_error` (nats), `chance` and `items`. Results of earlier versions lack these two.
    """
    model, tokenizer = load_model(folder), load_tokenizer(tokenizer_folder(folder))
    config: Any = model.config
    trained_at = config.max_position_embeddings
    lengths = sorted({trained_at, *(factor * study.recipe.sequence_length for factor in study.factors)})
    cost = flops(config, trained_at)
    return {
        "model": {
            "parameters": model.num_parameters(),
            "vocabulary": config.vocab_size,
            "keys": statistics.mean(mean_keys(config, trained_at)),
            "coverage": coverage(config, trained_at),
            "layer_types": config.layer_types,
            "layer_offsets": config.layer_offsets,
            "learned_alphas": _learned_alphas(model),
        },
        "flops_per_token": {
            "projections": cost.projections,
            "attention": cost.attention,
            "head": cost.head,
            "attention_share": cost.attention_share,
        },
        "convention": CONVENTION,
        "evaluation": _sweeps(model, data, targets, lengths),
        "copying": copying(model, distances(trained_at)),
        "ruler": ruler(model, tokenizer, Ruler(items=study.items), quiet=True)["rows"] if study.items else [],
        "lego": lego(model, tokenizer, Lego(items=study.items), quiet=True)["rows"] if study.items else [],
    }


def evaluate_stretched(
    folder: Path, data: PreparedData, kind: RopeScaling, plain: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The sweep `plain` again, past the training length, with RoPE stretched at each length by what it needs.

    One fixed factor would also cost at the shorter lengths, so this is the kindest way to treat a model that
    was trained without.
    """
    saved = files.read_json(folder / "config.json")
    trained_at, theta = saved["max_position_embeddings"], saved["rope_parameters"]["rope_theta"]
    sets: dict[str, dict[str, Any]] = {name: {} for name in plain}
    for length in sorted({int(length) for lengths in plain.values() for length in lengths if int(length) > trained_at}):
        parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": length / trained_at}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = trained_at
        model = load_model(folder, rope_parameters=parameters)
        for name, row in _again(model, data, plain, [length]).items():
            sets[name] |= row
    return sets


def evaluate_bounded(folder: Path, data: PreparedData, tokens: int, plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sweep `plain` again, in sequences longer than `tokens`, with full layers that see the last `tokens` alone."""
    model = load_model(folder, full_reach=tokens - 1)
    return _again(model, data, plain, [int(n) for n in next(iter(plain.values())) if int(n) > tokens])


def evaluate_lengthened(folder: Path, data: PreparedData, plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sweep `plain` again, at every length, with a model that was trained on in longer sequences."""
    return _again(load_model(folder), data, plain, [int(length) for length in next(iter(plain.values()))])


def _again(model: PreTrainedModel, data: PreparedData, plain: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """The sweep `plain` at some of its lengths with another model, over the same targets."""
    return _sweeps(model, data, swept_targets(plain), lengths)


def swept_targets(sets: dict[str, Any]) -> dict[str, int]:
    """Over how many targets of each held-out set a sweep went."""
    return {name: next(iter(rows.values()))["targets"] for name, rows in sets.items()}


def _sweeps(model: PreTrainedModel, data: PreparedData, targets: dict[str, int], lengths: list[int]) -> dict[str, Any]:
    """The length sweep over so many targets of each held-out set."""
    sets: dict[str, Any] = {}
    for name, tokens in targets.items():
        sets |= sweep(model, data, lengths=lengths, sets=[name], tokens=tokens, quiet=True)["sets"]
    return sets


def training_summary(run: Path) -> dict[str, Any]:
    """The loss over training and its speed, from a run's `metrics.jsonl`, and looks at held-out text while it trained.

    `held_out`: for each look the tokens of training, the loss there, and by how much that on training text is lower.
    `alone`: with the GPU for itself, at least for its turn. Results of earlier versions lack both; where processes
    shared a GPU, those were disturbed by evaluations.
    """
    lines, looks = _lines(run / "metrics.jsonl"), run / "held-out.jsonl"
    last = lines[-max(len(lines) // 20, 1) :]
    step = max(len(lines) // _CURVE_POINTS, 1)
    looked = _lines(looks) if looks.exists() else []
    speeds = [line["tokens_per_second"] for line in lines[1:]] or [lines[0]["tokens_per_second"]]
    return {
        "final_loss": statistics.mean(line["loss"] for line in last),
        "curve": [[line["tokens"], round(line["loss"], 4)] for line in lines[step - 1 :: step]],
        "held_out": [[line["tokens"], round(line["loss"], 4), round(line["gap"], 4)] for line in looked],
        "tokens_per_second": statistics.median(speeds),
        "alone": True,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine() -> dict[str, Any]:
    """The hardware of this process, and how many share it."""
    return {**hardware.description(), "processes_a_gpu": processes_a_gpu()}


def versions() -> dict[str, str]:
    """The versions that may move a result."""
    found = hardware.versions()
    return {**found, "fibattn": f"{found['fibattn']} (source {_source_digest()})"}


def _source_digest() -> str:
    """Which state of the library's and the study's source this is: the first digits of a SHA-256 over their files."""
    roots = [Path(package).parent for package in (fibattn.__file__, __file__)]
    parts = [
        f"{root.name}/{path.relative_to(root)} {files.sha256(path)}"
        for root in roots
        for path in sorted(root.rglob("*.py"))
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _learned_alphas(model: PreTrainedModel) -> list[float] | None:
    """The scale of every layer that learnt one, None where no layer did."""
    layers: Any = model.base_model.layers
    alphas = [float(layer.self_attn.alpha.detach()) for layer in layers if layer.self_attn.theta is not None]
    return alphas or None
