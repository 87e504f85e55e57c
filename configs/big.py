"""The big model of *Attention Is All You Need* (Vaswani et al., 2017): Table 3, last row, on any corpus.

6 + 6 layers of width 1024 with 16 heads, about 214 million parameters (the paper says 213), dropout 0.3,
300,000 updates; otherwise the base model. For English to French the paper has dropout 0.1: --model.dropout_rate=0.1.
Name your corpus with --data.corpus.
"""

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=1024,
            d_ff=4096,
            num_heads=16,
            encoder_layers=6,
            decoder_layers=6,
            norm="post",
            activation="relu",
            tie_embeddings="all",
            dropout_rate=0.3,
        ),
        data=DataConfig(vocab_size=37_000, source_row_length=256, target_row_length=256),
        optimizer=OptimizerConfig(
            name="adam",
            schedule="inverse_sqrt",
            warmup_steps=4000,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-9,
        ),
        training=TrainingConfig(
            steps=300_000,
            target_tokens_per_batch=24_576,  # 96 rows of 256, which divide over 8, 16 or 32 devices; the paper: 25,000
            label_smoothing=0.1,
        ),
        decoding=DecodingConfig(beam_size=4, length_penalty=0.6, max_extra_tokens=50),
    )
