"""The small model's text encoders before training, and what a hub folder's config.json says of text encoders of any size."""

from pathlib import Path
from typing import NamedTuple

from opensora_core.encoders.clip import CLIPEncoder
from opensora_core.encoders.t5 import T5Encoder
from opensora_core.encoders.tokens import read_tokenizer
from opensora_core.text.prompt import CLIP_LENGTH
from opensora_core.text.recipe import CLIP, T5

from .tokenizers import CLIP_FOLDER, T5_FOLDER

# In transformers' words. Proportions as released: CLIP has heads of 64.
T5_SIZES = {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 128, "num_layers": 2}
CLIP_SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 2}


class TextEncoders(NamedTuple):
    """Both encoders of a model."""

    t5: T5Encoder
    clip: CLIPEncoder


def untrained(directory: str | Path) -> TextEncoders:
    """Both encoders with the library's own random weights (torch's global generator), fp32, for the tokenizers in a directory."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    directory = Path(directory)
    t5, clip = read_tokenizer(T5, directory / T5_FOLDER), read_tokenizer(CLIP, directory / CLIP_FOLDER)
    t5_model = T5EncoderModel(T5Config(**t5_config(T5_SIZES, t5.size)))
    ids = {"bos_token_id": clip.end - 1, "pad_token_id": clip.pad, "eos_token_id": clip.end}
    clip_model = CLIPTextModel(CLIPTextConfig(**clip_config(CLIP_SIZES, clip.size, ids)["text_config"]))
    return TextEncoders(T5Encoder(t5_model, t5), CLIPEncoder(clip_model, clip))


def t5_config(sizes: dict[str, int], vocabulary: int) -> dict:
    """config.json of a T5 v1.1 encoder; sizes in transformers' words."""
    return {
        **{"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocabulary, **sizes},
        **{"num_decoder_layers": sizes["num_layers"], "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6},
        **{"relative_attention_num_buckets": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        **{"is_encoder_decoder": True, "tie_word_embeddings": False, "torch_dtype": "float16"},
    }


def clip_config(sizes: dict[str, int], vocabulary: int, ids: dict[str, int]) -> dict:
    """config.json of a CLIP of which only the text model is there.

    Args:
        ids: bos_token_id, pad_token_id, eos_token_id.
    """
    text = {
        **{"model_type": "clip_text_model", "vocab_size": vocabulary, "max_position_embeddings": CLIP_LENGTH},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": sizes["hidden_size"], **sizes, **ids},
    }
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": sizes["hidden_size"], "text_config": text}
