"""Lines to translate, odd ones among them, and the model and the config for it."""

import random

from tfm.config import DecodingConfig, ModelConfig

WORDS = ["haus", "tür", "baum", "weg", "see", "alt", "groß", "läuft", "steht", "und"]
MODEL_CONFIG = ModelConfig(d_model=16, d_ff=32, num_heads=4, encoder_layers=1, decoder_layers=1, norm="pre")
CONFIG = DecodingConfig(beam_size=1, max_source_length=24, tokens_per_batch=128, max_extra_tokens=4)
ODD_LINES = [
    "haus tür",
    "",
    "   ",
    "\t",
    "baum",
    "weg\u2028see\x85alt\x0bund",  # each of them is a line's end for str.splitlines
    "\u00a0",
    "a\rb",
    "🙂",
    "<2de> haus",
    "haus tür",
    "\ufffd\x00\x01",
]


def sentences(count: int, most: int = 7, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, most))) + "." for _ in range(count)]


LINES = [*sentences(10), *ODD_LINES, *sentences(6, 3, seed=2), " ".join(sentences(5, seed=3))]
