"""Small corpora of numbers that are spelt out, the config to prepare them with, and what a store holds of them."""

from pathlib import Path

import numpy as np

from tfm.config import Config, DataConfig
from tfm.data.shards import PairTable
from tfm.data.store import TokenStore
from tfm.data.tokenizer import EOS

WORDS = ["red", "house", "tree", "dog", "blue", "walks", "sees", "green", "tall", "cat"]
WORTE = ["rotes", "Haus", "Baum", "Hund", "blau", "geht", "sieht", "grün", "hoch", "Katze"]


def write_corpus(directory: Path, split: str, numbers: range) -> list[tuple[str, str]]:
    """Sentences whose words are the digits of a number, and their German."""
    pairs = [(" ".join(WORDS[int(d)] for d in str(n)), " ".join(WORTE[int(d)] for d in str(n))) for n in numbers]
    directory.mkdir(exist_ok=True)
    for side, language in enumerate(("en", "de")):
        (directory / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
    return pairs


def source_lengths(table: PairTable) -> np.ndarray:
    return table.lengths("source", np.arange(len(table)))


def config(*directories: Path, options: str = "", **fields) -> Config:
    corpus = tuple(f"text:{directory}/{{split}}.{{lang}}{options}" for directory in directories)
    return Config(data=DataConfig(**{"corpus": corpus, "vocab_size": 330, **fields}))


def texts(store: TokenStore, split: str, table: int = 0) -> list[tuple[str, str]]:
    rows = store.tables(split)[table]
    pairs = [rows.pair(i) for i in range(len(rows))]
    assert all(ids[-1] == EOS for pair in pairs for ids in pair)
    return [tuple(store.tokenizer.decode([ids[:-1] for ids in pair])) for pair in pairs]
