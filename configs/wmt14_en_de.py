"""WMT 2014 English to German with the paper's base model: 4.5 million sentence pairs, read through TFDS.

    python train.py --config=wmt14_en_de --workdir=runs/wmt14

**Not run here: what follows are other people's figures, and an estimate.** The data set is TFDS's
`wmt14_translate/de-en`, prepared in a format that can be read at random (array_record) under TFDS_DATA_DIR; validation
is newstest2013 and test is newstest2014 (3,003 sentences), and both directions are in it.

What to expect on newstest2014:

- The paper (Table 2) reports 27.3 BLEU for base and 28.4 for big. That is tokenised BLEU with split compounds, with
  beam 4, length penalty 0.6 and an average of the last 5 (base) or 20 (big) checkpoints; it is not comparable with
  sacreBLEU's.
- With sacreBLEU's own tokenisation (signature nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.x) published
  reproductions of the base model, trained and decoded in the same way stand at about 26 to 27. Greedy search without
  averaging is about one point lower.
- The paper trained base for 12 hours on 8 P100 GPUs, 96 GPU hours, 0.4 s an update. An estimate for today: 6 operations
  a parameter and token, with some 19 million parameters at work on each source token and 44 million on each target
  token, make about 1e18 operations in 100,000 updates. That is one to two hours on one H100 or on 8 chips of TPU v5e
  if 15 to 30 % of their bfloat16 peak is reached; evaluations come on top.
"""

from tfm.config import Config, DataConfig, DecodingConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(dropout_rate=0.1),
        data=DataConfig(
            corpus=("tfds:wmt14_translate/de-en",),
            source_language="en",
            target_language="de",
            vocab_size=37_000,
        ),
        optimizer=OptimizerConfig(name="adam", schedule="inverse_sqrt", warmup_steps=4000),
        training=TrainingConfig(
            steps=100_000,
            target_tokens_per_batch=24_576,
            checkpoint_every=1500,  # the paper's ten minutes, of which the last five checkpoints are averaged
            evaluate_every=3000,
            keep_last=5,
        ),
        decoding=DecodingConfig(beam_size=4, length_penalty=0.6, max_extra_tokens=50, average="last:5"),
    )
