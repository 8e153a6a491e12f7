"""Tokenizers of checkpoints, and whether they are complete and the model's own."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stun.config import StunError, one_line
from stun.files import check_folder
from stun.runtime.child import child
from stun.runtime.units import count

_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_TRIAL = "A text of words, numbers such as 1,234.5, and signs: é, 漢字, (a + b) * c.\n\n\tIt ends here. "
_BYTES = 256  # tokens that any text can be written with
_CHARACTERS = 100  # most of them a token, on average, in any text
_tried: set[tuple] = set()  # folders, as they were, whose tokenizers have been tried in this process


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint; code in the checkpoint is not run. Raises StunError."""
    check_folder(folder)
    # transformers makes an empty tokenizer of no files.
    if not any(file for pattern in _FILES for file in folder.glob(pattern)):
        raise StunError(
            f"{folder}: has no tokenizer; copy its files from where the model comes from: tokenizer.json, or tokenizer.model, or "
            "vocab.json and merges.txt, with tokenizer_config.json"
        )
    try:
        if (state := _state(folder)) not in _tried:
            with child(_load) as ask:
                ask(folder)
            _tried.add(state)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, all of them about these files
        raise StunError(f"{folder}: its tokenizer ({_present(folder)}) cannot be loaded: {one_line(error)}") from error


def _state(folder: Path) -> tuple:
    """What changes with any file of a folder: names, places on disk, sizes and times."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    return tuple((name, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for name, at in files)


def _load(folder: Path) -> None:
    """Load and use a tokenizer, once: its library may abort or take all memory over its files."""
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(_TRIAL)


def _present(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.glob("*token*.json"))) or "no tokenizer.json"


def token_ids(text: str | list[str], where: str, tokenizer: PreTrainedTokenizerBase) -> list:
    """Token ids of a text, or of each text in a list. Raises StunError."""
    try:
        return tokenizer(text)["input_ids"]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare ones, and panics of Rust
        raise StunError(f"{where}: the tokenizer of {tokenizer.name_or_path} fails: {one_line(error)}") from error


def check_size(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise StunError if the tokenizer is tiny beside the model's vocabulary: its vocabulary is missing."""
    if len(tokenizer) < min(_BYTES, vocab_size / 100):
        folder = Path(tokenizer.name_or_path)
        raise StunError(
            f"the tokenizer of {folder} ({_present(folder)}) has {count(len(tokenizer), 'token')}, the model's vocabulary "
            f"{vocab_size:,} (config.json: vocab_size); copy the missing files from where the model comes from"
        )


def check_vocabulary(ids: list[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise StunError if token ids exceed the model's vocabulary: the tokenizer is another model's."""
    if max(ids) >= vocab_size:
        name = f"the tokenizer of {tokenizer.name_or_path}"
        raise StunError(f"{name} yields id {max(ids)}, the model's vocabulary has {vocab_size} (config.json: vocab_size)")


def check_yield(texts: list[str], tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StunError if the token ids of texts say next to nothing: few, all alike, or mostly unknown ones."""
    special, ids = set(tokenizer.all_special_ids), [token for own in tokens for token in own]
    known = [token for token in ids if token not in special]
    unknown = ids.count(tokenizer.unk_token_id)
    characters = sum(len(word) for text in texts for word in text.split())
    are_few = len(known) * _CHARACTERS < characters
    are_alike = len(set(known)) <= 2 and len(set().union(*texts)) > 20
    if are_few or are_alike or 2 * unknown > len(ids):
        counts = f"{len(known):,} tokens ({len(set(known)):,} different) and {unknown:,} unknown ones"
        raise StunError(
            f"the tokenizer of {tokenizer.name_or_path} makes {counts} of {characters:,} characters of text: its files are "
            "incomplete, or another model's"
        )
