"""Language models of a few thousand parameters that encode prompts in untrained pipelines, and their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fdistill.adapters.tiny_parts import untrained

_WORDS = "a bold thin handwritten digit zero one two three four five six seven eight nine"


def gemma_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer of the kind of Gemma 2, which puts a token before prompts; words of the texts are one token each."""
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return _byte_pairs([*texts, _WORDS], list(names.values()), "<bos>", **names)


def qwen_tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer of the kind of Qwen 2.5; words of the texts are one token each."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "padding_side": "right"}
    return _byte_pairs([*texts, _WORDS], specials, **names)


def _byte_pairs(texts: Sequence[str], specials: Sequence[str], first: str | None = None, **names: str) -> Any:
    """Byte pairs trained until every word of the texts is one token; `first` stands before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            special_tokens=list(specials), initial_alphabet=alphabet, vocab_size=4000, show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, **names)


def gemma2_encoder(tokenizer: Any, width: int) -> Any:
    """A Gemma 2 language model of any width, without the head that predicts words."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.3,  # embeddings of prompts differ
    )
    return untrained(lambda: Gemma2Model(config))


def qwen25_vl_encoder(tokenizer: Any, width: int) -> Any:
    """A Qwen 2.5 language model that could see images, of a width that is a multiple of 24."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [width // 12] * 3, "rope_type": "default"},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": width,
            "patch_size": 2,
            "fullatt_block_indexes": [0],
        },
        image_token_id=0,
        video_token_id=0,
        vision_start_token_id=0,
        vision_end_token_id=0,
    )
    return untrained(lambda: Qwen2_5_VLForConditionalGeneration(config))
