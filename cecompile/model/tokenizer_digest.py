"""A digest that identifies a tokenizer."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of the settings that turn text into token ids and chats into text, in a fast or slow tokenizer."""
    marks = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    added = {token: int(number) for token, number in tokenizer.get_added_vocab().items()}
    settings = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")}
    sha = hashlib.sha256(json.dumps([marks, added, settings], sort_keys=True, default=str).encode())
    for part in _vocabulary(tokenizer):
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()


def _vocabulary(tokenizer: Any) -> list[bytes]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        serialised: str = backend.to_str()
        # the part before is padding and truncation, which every call may set anew
        start = max(0, serialised.find('"added_tokens"'))
        return [serialised[start:].encode()]
    with tempfile.TemporaryDirectory() as directory:
        try:
            files = [Path(file) for file in tokenizer.save_vocabulary(directory) if file]
        except NotImplementedError:
            files = []
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        return [vocabulary, *(file.read_bytes() for file in sorted(files))]
