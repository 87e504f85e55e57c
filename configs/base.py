"""The base model of *Attention Is All You Need* (Vaswani et al., 2017): Table 3, first row, on any corpus.

6 + 6 layers of width 512, post-norm, ReLU, sinusoids, one table for both embeddings and the output projection: about
63 million parameters (65 in the paper). Adam with the paper's schedule (section 5.3), 24,576 target tokens an update
(about 25,000 in the paper), 100,000 updates. Every field that the paper names is written out, so that this file can be
read beside it. Name your corpus with --data.corpus; for the paper's own data see wmt14_en_de.
"""

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=512,
            d_ff=2048,
            num_heads=8,
            encoder_layers=6,
            decoder_layers=6,
            norm="post",
            activation="relu",
            tie_embeddings="all",
            dropout_rate=0.1,
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
            steps=100_000,
            target_tokens_per_batch=24_576,  # 96 rows of 256, which divide over 8, 16 or 32 devices; the paper: 25,000
            label_smoothing=0.1,
        ),
        decoding=DecodingConfig(beam_size=4, length_penalty=0.6, max_extra_tokens=50),
    )
