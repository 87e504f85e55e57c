"""The embedded corpus of numbers, dates, times and amounts: a few minutes on two CPU cores, no download.

What `make demo` trains. Large enough to translate unseen sentences exactly, small enough to watch it learn.
"""

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=128,
            d_ff=512,
            num_heads=4,
            encoder_layers=2,
            decoder_layers=2,
            norm="pre",
            dropout_rate=0.0,
        ),
        data=DataConfig(
            corpus=("demo",),
            vocab_size=1000,
            source_row_length=64,
            target_row_length=64,
        ),
        optimizer=OptimizerConfig(
            schedule="cosine",
            learning_rate=2e-3,
            warmup_steps=100,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=700,
            target_tokens_per_batch=4096,
            unroll_layers=2,
            label_smoothing=0.0,
            evaluate_every=350,
            checkpoint_every=350,
            evaluate_sentences=200,
        ),
        decoding=DecodingConfig(beam_size=1, max_source_length=128, tokens_per_batch=4096),
    )
