"""A model learns to reverse sequences: corpus, tokenizer, training, checkpoint, translation from the run directory."""

import json

import pytest

from tfm import Translator
from tfm.training.loop import train


@pytest.mark.usefixtures("one_device")
def test_a_model_learns_to_reverse_sequences(reversal, tiny_config, tmp_path):
    config = tiny_config(
        {
            **{"model.d_model": 64, "model.d_ff": 128, "model.num_heads": 4, "model.dropout_rate": 0.0},
            **{"model.encoder_layers": 2, "model.decoder_layers": 2},
            **{
                "optimizer.name": "muon",
                "optimizer.schedule": "cosine",
                "optimizer.learning_rate": 1e-2,
                "optimizer.warmup_steps": 25,
            },
            **{"optimizer.clip_norm": 1.0, "training.label_smoothing": 0.0, "training.unroll_layers": 2},
            **{"training.target_tokens_per_batch": 1024, "training.steps": 150, "training.log_every": 15},
            **{"training.evaluate_sentences": 40},
        }
    )
    assert train(config, tmp_path / "run") == 0

    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    losses = [event["loss"] for event in events if event["kind"] == "train"]
    assert len(losses) == 10 and losses[-1] < losses[0] / 4
    [validation] = [event for event in events if event["kind"] == "validation"]
    assert validation["bleu"] > 90 and validation["perplexity"] < 1.5

    sources, references = ((reversal / f"test.{language}").read_text().split("\n")[:-1] for language in ("en", "de"))
    translations = Translator.load(tmp_path / "run").translate(sources)
    exact = sum(t.text == reference for t, reference in zip(translations, references, strict=True))
    assert exact >= 90, [(t.text, r) for t, r in zip(translations, references, strict=True) if t.text != r][:5]
