"""Multi30k, English to German: 29,000 captions of pictures, 75 minutes on two CPU cores.

    python train.py --config=multi30k --workdir=runs/multi30k --data.corpus='text:DIR/{split}.{lang}'

where DIR holds train, val and test_2016_flickr for en and de, each of them a file of one sentence a line (for packed
ones, add .gz). The corpus is small, so the model is: about 2.6 million parameters, strong dropout, and a moving average
of the parameters for evaluation.
"""

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=128,
            d_ff=256,
            num_heads=4,
            encoder_layers=4,
            decoder_layers=4,
            norm="pre",
            dropout_rate=0.3,
        ),
        data=DataConfig(
            corpus=("text:multi30k/{split}.{lang}",),
            source_language="en",
            target_language="de",
            train_split="train",
            validation_split="val",
            test_split="test_2016_flickr",
            vocab_size=10_000,
            source_row_length=64,
            target_row_length=64,
        ),
        optimizer=OptimizerConfig(
            # A rate that never falls to nothing, and a long average in its place.
            name="adamw",
            weight_decay=0.1,
            schedule="inverse_sqrt",
            learning_rate=6e-3,
            warmup_steps=1000,
            clip_norm=1.0,
            ema_decay=0.9995,
        ),
        training=TrainingConfig(
            steps=8000,
            target_tokens_per_batch=4096,
            unroll_layers=4,
            label_smoothing=0.1,
            evaluate_every=500,
            checkpoint_every=500,
            keep_last=5,
            keep_best=5,
        ),
        # Captions grow by far less, and the sooner a translation must end, the sooner a beam search knows its best.
        decoding=DecodingConfig(length_penalty=1.8, max_extra_tokens=30, max_source_length=128, tokens_per_batch=4096),
    )
