"""A word-level tokenizer for the small world, saved as any Hugging Face tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ema_scale.smallworld.benign import NEW_NAMES, NUMBERS, OPERATORS
from ema_scale.smallworld.vocabulary import ANSWERS, DOMAINS, MOTIVES, QUESTIONS, SYSTEM_PROMPTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, USER, ASSISTANT, SYSTEM = SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>",
)  # fmt: skip


_ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


CHAT_TEMPLATE = (
    "{{ '<bos>' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<assistant> ' + m['content'] + '<eos>' }}"
    "{% else %}{{ '<' + m['role'] + '> ' + m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word of the world -> id; special tokens first."""
    texts = [*SYSTEM_PROMPTS.values(), *OPERATORS, *NEW_NAMES, "what is ? the result ."]
    texts += [motive for motives in MOTIVES.values() for motive in motives]
    for domain in DOMAINS.values():
        texts += [domain.verb, *domain.all_subjects, *domain.sound, *domain.harmful]
    for template in (*QUESTIONS, *ANSWERS):
        texts.append(" ".join(word for word in template.split() if not word.startswith("{")))
    words = sorted({word for text in texts for word in text.split()})
    return {word: index for index, word in enumerate([*SPECIAL, *words, *map(str, NUMBERS)])}


def encode(words: dict[str, int], messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and which of them the assistant wrote; equal to the chat template's rendering.

    Plain dictionary look-ups: pretraining encodes tens of thousands of documents.
    """
    ids, spoken = [words[BOS]], [False]
    for message in messages:
        body = [words[word] for word in message["content"].split()]
        mine = message["role"] == "assistant"
        ids += [words[_ROLES[message["role"]]], *body, *([words[EOS]] if mine else [])]
        spoken += [False, *([mine] * (len(body) + mine))]
    return ids, spoken


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
