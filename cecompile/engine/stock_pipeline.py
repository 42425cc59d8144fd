"""`transformers`' own text generation, which every answer must equal.

The 2024 contest times `pipeline("text-generation", ...)` with greedy decoding, and accepts its output alone. So the
pipeline's own code, of the installed version, makes text from tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType

from cecompile.errors import UserError

# Fields of a generation config that make greedy decoding take another token than the most likely, or stop elsewhere,
# with the values that change nothing; for the fields of _UNSET, None changes nothing.
_PLAIN = {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0, "token_healing": False,
}  # fmt: skip
_UNSET = (
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "penalty_alpha", "dola_layers", "watermarking_config",
    "stop_strings", "max_time",
)  # fmt: skip


class StockPipeline:
    """The text-generation pipeline around a model, on the model's device, and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self._model = model
        self._pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, device=model.device)

    def answer(self, messages: list[dict[str, str]], new_tokens: int) -> str:
        """The pipeline's greedy answer to a conversation, of at most `new_tokens` tokens."""
        options = {"max_new_tokens": new_tokens, "return_full_text": False, "do_sample": False}
        return self._pipeline(messages, **options)[0]["generated_text"]

    def text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """The pipeline's text for the new `tokens` after a prompt."""
        whole, given = torch.tensor([[[*prompt, *tokens]]]), torch.tensor([list(prompt)])
        outputs = {"generated_sequence": whole, "input_ids": given, "prompt_text": ""}
        return self._pipeline.postprocess(outputs, return_type=ReturnType.NEW_TEXT)[0]["generated_text"]

    def continued(self, tokens: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy decoding's next tokens, at most `new_tokens`."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        pad = self._model.generation_config.pad_token_id
        out = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=0 if pad is None else pad,
        )  # fmt: skip
        return out[0, len(tokens) :].tolist()


def stop_tokens(name: str, config: GenerationConfig) -> frozenset[int]:
    """The tokens at which a model's answers end; `name` is the model's, for the message.

    Raises:
        UserError: `config` asks for more than the most likely token each time.
    """
    for field in (*_PLAIN, *_UNSET):
        value = getattr(config, field, None)
        if value not in (None, _PLAIN.get(field), []):
            problem = f"{field} {value!r:.40} asks for more than greedy decoding; use --engine reference"
            raise UserError(f"{name}: generation_config.json: {problem}")
    ends = config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
