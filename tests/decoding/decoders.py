"""The smallest model that a decoder can have, and how it is searched."""

import dataclasses

import jax

from tfm.config import DecodingConfig, MeshConfig, ModelConfig
from tfm.data.tokenizer import BOS, PAD, UNK
from tfm.model.transformer import Transformer
from tfm.sharding import make_mesh

VOCAB = 100
EXTRA = 6
MODEL = Transformer(
    ModelConfig(d_model=16, d_ff=32, num_heads=4, d_v=2, encoder_layers=1, decoder_layers=1, norm="pre"), VOCAB
)
CONFIG = DecodingConfig(beam_size=1, max_source_length=24, tokens_per_batch=128, max_extra_tokens=EXTRA)
BEAM = dataclasses.replace(CONFIG, beam_size=4, n_best=3)
BANNED = (PAD, BOS, UNK)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])
