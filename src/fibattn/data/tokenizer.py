"""A byte-level BPE tokenizer: trained on a sample of the mixture, or an existing one.

Every text can be encoded and decoding gives it back exactly. Texts are cut into words by the pattern of
GPT-4, with digits in groups of at most two, which suits a vocabulary of this size (nanochat). `<|bos|>`
begins every document and is also the end-of-text token; `<|pad|>` is for padding batches.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fibattn import files
from fibattn.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fibattn.data.prepared import PreparedData

BOS, PAD = "<|bos|>", "<|pad|>"
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SMALLEST, LARGEST = 256 + 2, 2**24
LONGEST = 1024  # bytes of a token: in one very long line merges would double without end


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train on `texts`; the vocabulary stays smaller than `vocab_size` when they hold too few words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        max_token_length=LONGEST,
        show_progress=False,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        padding_side="left",  # generation goes on at the right end
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a size that no tokenizer can be trained to."""
    if not SMALLEST <= vocab_size <= LARGEST:
        raise InputError(
            f"vocab_size is {vocab_size}; expected at least {SMALLEST} (256 bytes, {BOS}, {PAD}), at most {LARGEST:,}"
        )


def check_same_vocabulary(model: Path, data: "PreparedData") -> None:
    """Refuse data whose tokenizer has another vocabulary than that in the model folder, if there is one."""
    if not ((folder := tokenizer_folder(model)) / "tokenizer.json").exists():
        return
    if load_tokenizer(folder).get_vocab() != load_tokenizer(data.tokenizer_path).get_vocab():
        raise InputError(
            f"{model} was trained with another tokenizer than the data in {data.folder}; use the data it was trained "
            f"on, or prepare the text with its own: fibattn prepare … --tokenizer {shlex.quote(str(folder))}"
        )


def tokenizer_folder(model: Path) -> Path:
    """Where the tokenizer of a model folder is: in it, or for a checkpoint in its run."""
    places = (model, model.parent / "tokenizer", model.parent / "model")
    return next((folder for folder in places if (folder / "tokenizer.json").exists()), model)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """A tokenizer from a folder or the Hub; `InputError`: none, or none that can separate documents."""
    from transformers import AutoTokenizer

    if (Path(path) / "config.json").exists():
        # A model folder: Transformers looks its kind up, and asks to run code for one that it does not know.
        import fibattn.model  # noqa: F401  # pyright: ignore[reportUnusedImport]

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no tokenizer can be loaded from {str(path)!r} ({reason}); expected a folder with "
            "tokenizer.json, or an id of the Hub and a network"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {str(path)!r} has no tokenizer.json; convert it to a fast tokenizer first")
    separator(tokenizer)
    return tokenizer


def separator(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The id that begins every document: the tokenizer's bos, else its eos."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise InputError("the tokenizer has neither a bos nor an eos token; one is needed between documents: add it")


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id and one: ids may have gaps, so there can be fewer tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The fingerprint of what the tokenizer does, wherever it was loaded from."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a Transformers tokenizer folder, whole or not at all."""
    with files.replacing_folder(folder) as staged:
        tokenizer.save_pretrained(str(staged))


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """How many bytes of text each token stands for: uint16 [vocabulary], 0 for special tokens.

    With these the bytes of any range of tokens are exact. `InputError` for a tokenizer that is neither
    byte-level nor SentencePiece-like with byte fallback, since its tokens have no fixed length in bytes.
    """
    backend = tokenizer.backend_tokenizer
    settings = json.loads(backend.to_str())
    decoder = json.dumps(settings["decoder"])
    byte_level, byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    if not byte_level and not byte_fallback:
        raise InputError("the tokenizer is not byte-level, so text cannot be given back exactly; choose one that is")
    added = {token["id"]: token for token in settings["added_tokens"]}
    sizes = np.zeros(vocabulary_size(tokenizer), np.uint16)
    for token, index in backend.get_vocab().items():
        if byte_fallback and len(token) == 6 and token.startswith("<0x"):  # even where it is called special
            sizes[index] = 1
        elif index in added:
            sizes[index] = 0 if added[index]["special"] else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)  # one character of the byte alphabet a byte
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    return sizes
