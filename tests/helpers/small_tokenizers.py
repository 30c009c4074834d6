"""Small fast tokenizers that behave as the real ones do, trained on the text below.

byte_level: Llama 3's and GPT-2's kind, a token is a run of UTF-8 bytes.
sentencepiece: Llama 2's kind, "▁" for a blank and before a text, unknown characters as <0x..> bytes.
token_bytes: which bytes of the text each token holds, found without offsets.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT = [
    "The author's full name is Hina Ameen. She was born in Karachi, Pakistan on 06/30/1975.",
    "Question: Who wrote the first program?\nAnswer: Ada Lovelace wrote it in 1843, in London.",
    "The cat sat on the mat. The dog did not; it ran to the city, and the city was far away.",
    "東京は日本の首都です。東京は大きい。京都も大きい。café café naïve 😀😃😀😃 👩‍👩‍👧 user assistant system",
] * 8
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|im_start|>", "<|im_end|>"]  # fmt: skip

# As Llama 3's: strips every content.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Qwen's: content as it is, a line break after the terminator.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an empty thought before the answer, which the prompt for generation has only without thinking.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Llama 3.2's: today's date, unless it is given another one.
DATED = (
    "<|im_start|>system\n{% if date_string is defined %}{{ date_string }}{% else %}"
    "{{ strftime_now('%d %b %Y') }}{% endif %}<|im_end|>\n" + CHATML
)


def byte_level(
    chat_template: str | None = None,
    *,
    trim_offsets: bool = False,
    add_prefix_space: bool = False,
    bos: bool = True,
    normalizer: Any = None,
    split: bool = True,
) -> PreTrainedTokenizerFast:
    """split=False: no words, so that merges cross blanks and characters."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    gpt2 = split and add_prefix_space  # its own pattern, so that only a text's first word gets a blank
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=gpt2)
    words = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")] if split and not gpt2 else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    post: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=add_prefix_space)]
    if bos:
        bos_first = f"{SPECIAL[0]} $A"
        post.append(processors.TemplateProcessing(single=bos_first, special_tokens=[(SPECIAL[0], 0)]))
    backend.post_processor = processors.Sequence(post)
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names)


def sentencepiece(
    chat_template: str | None = None,
    *,
    metaspace: bool = True,
    bos: bool = True,
    eos: bool = False,
    prepend: str = "first",
) -> PreTrainedTokenizerFast:
    """metaspace: blanks by the pre-tokenizer (newer files), else by the normalizer (older ones)."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    # Words for the training alone, so that no piece crosses a blank.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    # Other characters are left to the byte tokens. (limit_alphabet breaks ties by chance.)
    known = [re.sub("[^ -~é東京は都]", " ", text) for text in TEXT]
    backend.train_from_iterator(known, trainer)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    else:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # The byte tokens are ordinary vocabulary: only the named ones are special.
    state = backend.to_str()
    state = re.sub(r'\{"id":\d+,"content":"<0x[0-9A-F]{2}>"[^}]*\},?', "", state).replace(",],", "],")
    backend = Tokenizer.from_str(state)
    around = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    special_ids = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special_ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names)


BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}  # behind each character of a byte-level piece


def token_bytes(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """[start, end) in UTF-8 bytes of text for each token: the pieces laid end to end."""
    raw, position, ranges = text.encode(), 0, []
    # The normalizer puts a blank before each run of text, a pre-tokenizer only where there is none.
    always = tokenizer.unk_token is not None and tokenizer.backend_tokenizer.normalizer is not None
    fresh = True  # at the beginning of a run of text
    for token in ids:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if token in tokenizer.added_tokens_decoder:
            written = raw[position:].startswith(piece.encode())  # else added around the text
            held = piece.encode() if written else b""
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            held = bytes([int(piece[3:5], 16)])
        elif tokenizer.unk_token is None:
            held = bytes(BYTE_OF[char] for char in piece)
        elif always and fresh:
            held = piece[1:].replace("▁", " ").encode()
        else:
            held = piece.replace("▁", " ").encode()
        if held.startswith(b" ") and raw[position : position + 1] != b" ":
            held = held[1:]  # a blank put before the text
        fresh = token in tokenizer.added_tokens_decoder
        assert raw[position:].startswith(held), (text, piece, position)
        ranges.append((position, position + len(held)))
        position += len(held)
    assert position == len(raw)
    return ranges
