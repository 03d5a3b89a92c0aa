"""A tiny real tokenizer: byte-level BPE, special tokens, a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TOKENIZER_VOCAB = 300  # give tiny_model this vocab_size
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2, as tiny_model's configurations say
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}"
    "{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
_CORPUS = (
    "the printer in the hall is on fire, please send someone",
    "the invoice of the last month is wrong, please correct it",
    "der Drucker brennt, bitte schicken Sie jemanden: naïve café, 東京",
)


def tiny_tokenizer(
    directory: Path, *, chat_template: str | None = CHAT_TEMPLATE, token_types: bool = False
) -> Path:
    """Saves a tokenizer of `TOKENIZER_VOCAB` tokens at most beside a model; any text round-trips.

    It begins texts with "<s>" (id 1), as Llama's does. token_types: it tells a pair's texts apart,
    as BERT's does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A </s> $B:1" if token_types else "<s> $A </s> $B",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in SPECIAL_TOKENS[1:]],
    )
    names = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=names,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory
