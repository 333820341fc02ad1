"""Parts of untrained text-to-image pipelines of a few thousand parameters, for trying recipes out.

The tokenizers, text encoders and autoencoders are of the real classes. Latents are 8 x 8, images 16 x 16 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

#: Side of the images in pixels, and of their latents.
RESOLUTION, LATENTS = 16, 8
#: Widths of text encoders: CLIP's first and second one, T5's, and a language model's.
CLIP_WIDTH, CLIP_2_WIDTH, T5_WIDTH, QWEN_WIDTH = 16, 24, 32, 8
#: Channels of the latents of FLUX.2's autoencoder, of which its networks see patches of 2 x 2.
FLUX2_CHANNELS = 4

_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_HEAD = 8  # channels of a text encoder's attention head
#: Qwen3's template of what a user says, without instructions and tools. A model may be told not to think.
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not (enable_thinking | default(true)) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
_CHAT_SPECIAL = (_END_OF_TEXT, "<|im_start|>", _END_OF_TURN, "<think>", "</think>")


def untrained(make: Callable[[], nn.Module]) -> Any:
    """Makes a module in eval mode, with the same random weights every time.

    Parameters that are initialised to zero get random values too, so that outputs depend on inputs. The global random
    state is left unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return module


def clip_tokenizer(pad: str = _END) -> Any:
    """A CLIP tokenizer of all 256 bytes, alone and at the end of a word, and a few merges; its limit is 77 tokens."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "o"), ("l", "d</w>"), ("bo", "ld</w>"), ("d", "i"), ("g", "i"), ("t", "h")]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), _START, _END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": pad,
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)


def t5_tokenizer() -> Any:
    """A T5 tokenizer: a unigram model of letters and a few words; its limit is 512 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["▁a", "▁bold", "▁thin", "▁digit", "▁seven"]
    scores = [(token, 0.0) for token in _T5_SPECIAL] + [("▁", -2.0)]
    scores += [(word, -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder, extra_ids=0)


def chat_tokenizer() -> Any:
    """A tokenizer of the kind of Qwen3: all 256 bytes, a few words, and a template for what users say."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["user", "assistant", "Ġa", "Ġbold", "Ġthin", "Ġdigit", "Ġseven"]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    vocabulary = [*symbols, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _CHAT_SPECIAL])
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=tokenizer,
        pad_token=_END_OF_TEXT,
        eos_token=_END_OF_TURN,
        padding_side="right",
        chat_template=_CHAT,
    )


def clip_encoder(tokenizer: Any, width: int, *, projected: bool) -> Any:
    """A CLIP text encoder; the width must be a multiple of 8, the channels of a head."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // _HEAD,
        max_position_embeddings=77,
        initializer_factor=5.0,  # embeddings of prompts differ, but attention does not saturate
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return untrained(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5_encoder(tokenizer: Any, width: int) -> Any:
    """A T5 text encoder of any width."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=_HEAD,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return untrained(lambda: T5EncoderModel(config))


def qwen3_encoder(tokenizer: Any, width: int, *, layers: int = 2, predicts_words: bool = False) -> Any:
    """A Qwen3 language model of any width, with or without the head that predicts words."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=_HEAD,
        initializer_range=0.3,  # embeddings of prompts differ
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return untrained(lambda: (Qwen3ForCausalLM if predicts_words else Qwen3Model)(config))


def autoencoder(factor: int = RESOLUTION // LATENTS, **changes: Any) -> AutoencoderKL:
    """An autoencoder that divides height and width by a power of 2; it has 4 latent channels unless `changes` say
    otherwise.
    """
    levels = factor.bit_length()
    settings: dict[str, Any] = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": RESOLUTION,
        "scaling_factor": 0.5,
    }
    return untrained(lambda: AutoencoderKL(**(settings | changes)))


def wide_autoencoder(factor: int = RESOLUTION // LATENTS) -> AutoencoderKL:
    """An autoencoder of the kind of Stable Diffusion 3 and Flux: 16 latent channels, and a shift."""
    return autoencoder(
        factor,
        latent_channels=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
