"""What other programs look up by name: that the model is a causal language model, and what follows from it."""

import logging
import sys
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
from forked import Server
from tiny_models import model, tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.modelcard import TASK_MAPPING

import fibattn
from fibattn.data.tokenizer import BOS, train_tokenizer


def smoothed(made: Any, folder: Path) -> float:
    """The loss that the Trainer computes with label smoothing of 0.1."""
    arguments = TrainingArguments(
        output_dir=str(folder), label_smoothing_factor=0.1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    ids = tokens(2, 40)
    return float(Trainer(model=made, args=arguments).compute_loss(made, {"input_ids": ids, "labels": ids}))


def by_hand(made: Any) -> float:
    ids = tokens(2, 40)
    logits = made(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1))


@pytest.mark.parametrize("kind", ["linear", "mixture", "learned", "converted"])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_label_smoothing_shifts_the_labels(kind: str, mode: str, tmp_path: Path) -> None:
    made: Any = fibattn.convert(foreign_decoders.model(), window=3) if kind == "converted" else model(kind)
    made.train(mode == "training")
    assert smoothed(made, tmp_path) == pytest.approx(by_hand(made), rel=1e-4)


def test_label_smoothing_shifts_the_labels_of_an_adapted_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(
        model("mixture"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    )
    assert smoothed(adapted, tmp_path) == pytest.approx(by_hand(adapted), rel=1e-4)


@pytest.mark.parametrize("kind", ["mixture", "converted", "adapted"])
def test_the_trainer_evaluates_loss_and_metrics(kind: str, tmp_path: Path) -> None:
    """It finds by name which arguments are labels, and has no loss where one of them is not given."""
    made: Any = fibattn.convert(foreign_decoders.model(), window=3) if kind == "converted" else model("mixture")
    if kind == "adapted":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        made = peft.get_peft_model(made, peft.LoraConfig(task_type="CAUSAL_LM"))
    ids = tokens(4, 30)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    seen = {}
    trainer = Trainer(
        model=made, args=arguments, eval_dataset=rows, compute_metrics=lambda found: seen.update(vars(found)) or {}
    )
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(float(made.eval()(input_ids=ids, labels=ids).loss.detach()), rel=1e-4)
    assert seen["label_ids"].tolist() == ids.tolist()
    assert seen["predictions"].shape == (4, 30, 61)


@pytest.mark.parametrize("chosen", ["LoraConfig", "IA3Config", "LNTuningConfig", "LoHaConfig", "OFTConfig"])
def test_an_adapter_that_names_no_layers_goes_where_a_llamas_goes(chosen: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def places(made: Any) -> set[str]:
        adapted = peft.get_peft_model(made, getattr(peft, chosen)(task_type="CAUSAL_LM"))
        return {name for name, one in adapted.named_parameters() if one.requires_grad}

    assert places(model("learned mixture")) == places(foreign_decoders.model()) != set()


@pytest.mark.parametrize("order", ["peft, fibattn", "fibattn, peft", "fibattn, transformers, peft"])
def test_peft_knows_the_layers_whichever_is_imported_first(order: str, foreign: Server) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    code = f"import {order}; from peft.utils import constants as c; "
    code += "print(c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['fibattn'])"
    done = foreign.run([sys.executable, "-c", code], check=True)
    assert done.stdout.splitlines()[-1] == "['q_proj', 'v_proj']"


def test_a_tokenizer_may_be_loaded_with_tokens_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers reads the configuration with the tokenizer's options, `pad_token` among them."""
    model().save_pretrained(tmp_path)
    train_tokenizer(["a text"], 300).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    try:
        assert AutoTokenizer.from_pretrained(tmp_path, pad_token=BOS).pad_token == BOS
    finally:
        logging.getLogger("transformers").propagate = False
    assert "to instantiate a model of type" not in caplog.text


def test_the_auto_classes_and_their_tables_stay_readable() -> None:
    """A name in a table whose class is elsewhere must not break those who read the whole table."""
    assert fibattn.FibAttnForCausalLM in AutoModelForCausalLM._model_mapping.values()
    assert fibattn.FibAttnConfig in list(AutoModelForCausalLM._model_mapping.keys())
    assert "FibAttnForCausalLM" in TASK_MAPPING["text-generation"].values()
    assert type(AutoModelForCausalLM.from_config(model().config)) is fibattn.FibAttnForCausalLM


def test_a_text_generation_pipeline_knows_the_model(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TextGenerationPipeline

    tokenizer = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(97 + i): i for i in range(26)}
    words = tokenizer.Tokenizer(tokenizer.models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = tokenizer.pre_tokenizers.Whitespace()
    pipe = TextGenerationPipeline(
        model=model(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    )
    assert pipe("b c d", max_new_tokens=3, do_sample=False, return_full_text=True)[0]["generated_text"].startswith(
        "b c d"
    )
    assert "not supported" not in caplog.text
