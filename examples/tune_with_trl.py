"""Train a model further with TRL's SFTTrainer: on texts or chats, packed, all weights or LoRA.

python examples/tune_with_trl.py MODEL FILE.jsonl OUT                # a "text" or "messages" in each line
python examples/tune_with_trl.py MODEL FILE.jsonl OUT --lora 16      # OUT is an adapter then
python examples/tune_with_trl.py MODEL FILE.jsonl OUT --steps 100 --length 1024 --no-packing

MODEL is the folder of a model that was trained here, converted or healed. It needs: pip install trl peft
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

import fibattn  # noqa: F401  # so that the folder needs no trust_remote_code

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("out")
parser.add_argument("--lora", type=int, help="the rank of an adapter at the attention's projections")
parser.add_argument("--steps", type=int, default=-1, help="updates; all of the data once when left out")
parser.add_argument("--length", type=int, default=1024, help="tokens of a row at most")
parser.add_argument(
    "--chat-template", help="a model's folder or a file: how chats are written where MODEL does not say"
)
parser.add_argument("--rate", type=float, default=1e-4)
parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True, help="several examples in a row")
given = parser.parse_args()

data = load_dataset("json", data_files=given.data, split="train")
chats = "messages" in data.column_names  # pyright: ignore
if chats and not (given.chat_template or AutoTokenizer.from_pretrained(given.model).chat_template):
    parser.error(f"{given.model} has no chat template; give --chat-template a model's folder or a file that has one")
# An adapter says by its task which class loads the model that it belongs to.
adapter = given.lora and LoraConfig(task_type="CAUSAL_LM", r=given.lora, target_modules=r".*self_attn\.[qkvo]_proj")
trainer = SFTTrainer(
    model=given.model,
    train_dataset=data,  # pyright: ignore[reportArgumentType]
    peft_config=adapter or None,
    args=SFTConfig(
        output_dir=given.out,
        max_length=given.length,
        max_steps=given.steps,
        learning_rate=given.rate,
        packing=given.packing,
        chat_template_path=given.chat_template,
        assistant_only_loss=chats,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
)
trainer.train()
trainer.save_model(given.out)
