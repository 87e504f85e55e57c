"""Every rule of the config's validation, and its way into a file and back."""

import json

import pytest

from tfm.config import Config, ConfigError, InputError, ModelConfig, fields_of, from_dict, from_json


def override(**values) -> Config:
    """The default config with fields set by their dotted names, dots written as two underscores."""
    sections = Config().to_dict()
    for name, value in values.items():
        section, field = name.split("__")
        assert field in sections[section], name
        sections[section][field] = value
    return from_dict(sections)


def refusal(**values) -> str:
    with pytest.raises(ConfigError) as caught:
        override(**values).validate()
    message = str(caught.value)
    assert "\n" not in message
    return message


def names(text: str) -> list[str]:
    return text.split()


AT_LEAST_ONE = names("""
    model.d_model model.d_ff model.num_heads model.d_k model.d_v model.encoder_layers model.decoder_layers
    data.vocab_size data.tokenizer_sample data.source_row_length data.target_row_length data.window_pairs
    data.read_ahead data.segmentations
    optimizer.warmup_steps optimizer.decay_steps
    training.steps training.target_tokens_per_batch training.gradient_accumulation training.unroll_layers
    training.log_every training.checkpoint_every training.keep_last training.evaluate_every training.evaluate_sentences
    training.max_skipped_steps
    data.max_length_ratio
    decoding.beam_size decoding.n_best decoding.tokens_per_batch training.evaluate_beam_size
    hosts.count hosts.start_timeout hosts.heartbeat_timeout mesh.slices
""")
NOT_NEGATIVE = names("""
    optimizer.learning_rate optimizer.weight_decay optimizer.clip_norm data.segmentation_alpha
    training.keep_best training.early_stopping training.seed decoding.length_penalty decoding.max_extra_tokens
    decoding.min_length decoding.sampling_top_k decoding.sampling_seed decoding.sentences_per_batch
    hosts.index hosts.compile_timeout hosts.step_timeout hosts.evaluation_timeout hosts.save_timeout
""")
SHARES = names("""
    model.dropout_rate model.attention_dropout_rate model.activation_dropout_rate model.token_dropout_rate
    optimizer.beta1 optimizer.beta2 optimizer.ema_decay optimizer.final_learning_rate training.label_smoothing
""")
CHOICES = names("""
    model.norm model.activation model.tie_embeddings model.dtype model.attention data.tokenizer_model optimizer.name
    optimizer.schedule training.best_metric training.remat decoding.ensemble_mean
""")


def keyword(name: str, value) -> dict:
    return {name.replace(".", "__"): value}


@pytest.mark.parametrize("name", AT_LEAST_ONE)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_and_counts_are_at_least_one(name, value):
    assert refusal(**keyword(name, value)) == f"{name}={value}: must be at least 1"


def test_a_source_has_room_for_a_token_and_its_end():
    assert refusal(decoding__max_source_length=1) == "decoding.max_source_length=1: must be at least 2"


def test_an_epsilon_is_more_than_nothing_in_float32():
    """With 0, Adam divides nothing by nothing where a parameter has no gradient."""
    assert refusal(optimizer__epsilon=0) == "optimizer.epsilon=0: must be at least 1e-30"


@pytest.mark.parametrize("value", [float("inf"), 1e39])
def test_what_float32_cannot_hold_is_refused(value):
    """The parameters would be infinite, and the checkpoint called good."""
    expected = f"optimizer.learning_rate={value}: must be a number that float32 can hold"
    assert refusal(optimizer__learning_rate=value) == expected


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_what_may_be_zero_may_not_be_negative(name):
    assert refusal(**keyword(name, -1)) == f"{name}=-1: must be at least 0"
    rules = ("must be at least 0", "expected one whole number", "expected one whole number or None")
    assert refusal(**keyword(name, float("nan"))) in [f"{name}=nan: {rule}" for rule in rules]
    # What alone would have no effect, by rules of their own.
    others = {"optimizer.weight_decay": "optimizer__name", "data.segmentation_alpha": "data__segmentations"}
    needed = {"optimizer__name": "adamw", "data__segmentations": 2}
    company = {others[name]: needed[others[name]]} if name in others else {}
    override(**keyword(name, 0), **company).validate()


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize(
    ("value", "rule"), [(-0.1, "at least 0"), (float("nan"), "at least 0"), (1, "below 1"), (1.5, "below 1")]
)
def test_shares_are_from_zero_to_below_one(name, value, rule):
    assert refusal(**keyword(name, value)) == f"{name}={value}: must be {rule}"
    override(**keyword(name, 0.0)).validate()


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_those_that_are_named(name):
    message = refusal(**keyword(name, "best of all"))
    assert message.startswith(f"{name}='best of all': must be one of ")
    assert str(fields_of(Config())[name]) in message


def test_every_field_has_a_rule_or_needs_none():
    """A new field is either added to a list here, and so to the rules, or to those that any value of the type suits."""
    ruled = {"decoding.max_source_length", "optimizer.epsilon", *AT_LEAST_ONE, *NOT_NEGATIVE, *SHARES, *CHOICES}
    pairs = {*names("data.corpus data.source_language data.target_language data.train_split data.validation_split")}
    sampling = {*names("decoding.sampling decoding.sampling_temperature decoding.sampling_top_p")}
    free = {
        "data.test_split",
        "data.tokenizer",
        "data.drop_duplicates",
        "data.store",
        "hosts.coordinator",
        "data.cache_dir",
        "training.initialize_from",
        "training.deterministic",
        "decoding.average",
    }
    assert set(fields_of(Config())) == ruled | pairs | sampling | free | {"mesh.data", "mesh.fsdp", "mesh.tensor"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(model__d_model=100, model__num_heads=3), ["model.d_model=100", "model.num_heads=3", "model.d_k"]),
        (dict(model__d_model=100, model__num_heads=3, model__d_k=8), ["model.d_model=100", "set model.d_v"]),
        (dict(model__d_model=63, model__d_k=8, model__d_v=8), ["model.d_model=63", "must be even"]),
        (dict(data__corpus=()), ["data.corpus is empty"]),
        (dict(optimizer__decay_steps=5), ["optimizer.decay_steps=5 has no effect", "optimizer.schedule=inverse_sqrt"]),
        (dict(optimizer__final_learning_rate=0.1), ["optimizer.final_learning_rate=0.1 has no effect", "use cosine"]),
        (dict(decoding__average="first:5"), ["decoding.average='first:5'", "last:N or best:N"]),
        (dict(decoding__average="last:5"), ["decoding.average=last:5", "training.keep_last=3"]),
        (dict(decoding__average="best:2"), ["decoding.average=best:2", "training.keep_best=1"]),
        (dict(decoding__max_extra_tokens=2**31), ["max_extra_tokens=2147483648", "below 2147483648"]),
        (dict(training__seed=2**32), ["training.seed=4294967296", "must be below 4294967296"]),
        (dict(data__target_language="en"), ["data.source_language and data.target_language are both 'en'"]),
        (dict(data__validation_split="train"), ["data.train_split and data.validation_split are both 'train'"]),
        (
            dict(training__target_tokens_per_batch=1000, training__gradient_accumulation=4),
            [
                "training.target_tokens_per_batch=1000 has room for 3 rows",
                "data.target_row_length=256",
                "training.gradient_accumulation=4",
            ],
        ),
        (
            dict(optimizer__schedule="cosine", training__steps=4000),
            ["optimizer.warmup_steps=4000", "training.steps=4000", "the cosine schedule"],
        ),
        (
            dict(optimizer__schedule="wsd", training__steps=5000, optimizer__decay_steps=1001),
            ["optimizer.warmup_steps=4000 and optimizer.decay_steps=1001", "training.steps=5000"],
        ),
        (dict(optimizer__weight_decay=0.1), ["optimizer.weight_decay=0.1", "optimizer.name=adam", "use adamw"]),
        (
            dict(decoding__tokens_per_batch=100),
            ["decoding.tokens_per_batch=100", "decoding.max_source_length=256"],
        ),
        (dict(decoding__n_best=5), ["decoding.n_best=5", "decoding.beam_size=4", "decoding.sampling=True"]),
        (
            dict(optimizer__name="adafactor", optimizer__beta2=0.9),
            ["optimizer.beta2=0.9", "optimizer.name=adafactor"],
        ),
        (dict(data__tokenizer="a.model", data__tokenizer_model="bpe"), ["data.tokenizer_model=bpe", "data.tokenizer="]),
        (dict(data__segmentation_alpha=0.7), ["data.segmentation_alpha=0.7", "data.segmentations=1"]),
        (
            dict(data__segmentation_alpha=3.0, data__segmentations=2, data__tokenizer_model="bpe"),
            ["data.segmentation_alpha=3.0", "data.tokenizer_model=bpe"],
        ),
        (dict(decoding__min_length=306), ["decoding.min_length=306", "305 by", "max_source_length=256", "tokens=50"]),
        (dict(decoding__length_penalty=30.0), ["decoding.length_penalty=30.0", "305 tokens", "float32"]),
        (dict(decoding__sampling_top_k=5), ["decoding.sampling_top_k=5", "without decoding.sampling=True"]),
        (dict(decoding__sampling_seed=1), ["decoding.sampling_seed=1", "without decoding.sampling=True"]),
        (
            dict(decoding__sampling=True, decoding__sampling_temperature=0.0),
            ["sampling_temperature=0", "at least 1e-06"],
        ),
        (
            dict(decoding__sampling=True, decoding__sampling_seed=2**32),
            ["sampling_seed=4294967296", "must be below 4294967296"],
        ),
        (dict(decoding__sampling=True, decoding__sampling_top_p=0.0), ["sampling_top_p=0.0", "at least 1e-30"]),
        (dict(decoding__max_extra_tokens=2**31 - 1), ["decoding.max_extra_tokens=2147483647", "at most 1,073,741,824"]),
        (dict(decoding__sampling=True, decoding__sampling_top_p=1.5), ["sampling_top_p=1.5", "at most 1"]),
        (dict(mesh__fsdp=-1), ["mesh.data and mesh.fsdp are both -1"]),
        (dict(mesh__tensor=0), ["mesh.tensor=0"]),
        (dict(mesh__data=-2), ["mesh.data=-2"]),
    ],
)
def test_values_that_contradict_each_other_are_refused_and_both_named(values, named):
    message = refusal(**values)
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize(
    "values",
    [
        dict(model__d_model=100, model__num_heads=3, model__d_k=8, model__d_v=8),
        dict(training__target_tokens_per_batch=1024, training__gradient_accumulation=4),
        dict(optimizer__schedule="cosine", training__steps=4001),
        dict(training__steps=10),  # the paper's schedule may end within its warm-up
        dict(optimizer__schedule="wsd", training__steps=5000, optimizer__decay_steps=1000),
        dict(optimizer__weight_decay=0.1, optimizer__name="adamw"),
        dict(optimizer__weight_decay=0.1, optimizer__name="adafactor"),
        dict(decoding__tokens_per_batch=256),
        dict(decoding__length_penalty=20.0),
        dict(decoding__sampling=True, decoding__n_best=9, decoding__sampling_top_p=0.9, decoding__sampling_seed=4),
        dict(mesh__data=2, mesh__fsdp=-1),
        dict(optimizer__learning_rate=None, optimizer__decay_steps=None),
    ],
)
def test_what_stands_just_within_the_rules_is_accepted(values):
    config = override(**values)
    assert config.validate() is config


def test_a_config_error_is_an_input_error():
    assert issubclass(ConfigError, InputError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"d_modl": 3}}, "unknown field model.d_modl; did you mean model.d_model?"),
        ({"modell": {}}, "unknown field modell; did you mean model?"),
        ({"optimizer": {"zzzzz": 1}}, "unknown field optimizer.zzzzz"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(values, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert str(caught.value) == message


def test_what_is_left_out_has_its_default():
    assert from_dict({}) == Config()
    assert from_dict({"model": {"d_model": 256}}) == Config(model=ModelConfig(d_model=256))


def test_a_config_survives_a_file(tmp_path):
    config = override(
        data__corpus=["text:a.{split}.{lang};weight=2", "demo"],
        data__store="gs://bucket/ä",
        optimizer__learning_rate=1e-9,
        model__d_k=7,
        decoding__average="last:5",
    )
    assert isinstance(config.data.corpus, tuple)
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert from_json(path) == config
    assert json.loads(config.to_json()) == json.loads(from_json(path).to_json())


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model": 3}', '{"model": {"d_modl": 3}}', '{"model": [1]}', "\xff"])
def test_a_file_that_holds_no_config_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        from_json(path)
    assert str(caught.value).startswith(f"{path}: not a config of tfm: ")
    assert "\n" not in str(caught.value)


def test_fields_have_dotted_names():
    fields = fields_of(Config())
    assert fields["model.d_model"] == 512 and fields["data.corpus"] == ("demo",)
    assert len(fields) == sum(len(section) for section in Config().to_dict().values())


@pytest.mark.parametrize(("tokens", "parts", "rows"), [(25_600, 1, 100), (25_600, 3, 99), (1000, 2, 2), (511, 1, 1)])
def test_rows_of_a_batch(tokens, parts, rows):
    config = override(training__target_tokens_per_batch=tokens, training__gradient_accumulation=parts)
    assert config.rows_per_batch == rows


@pytest.mark.parametrize(
    ("values", "widths"),
    [({}, (64, 64)), ({"d_k": 16}, (16, 64)), ({"d_v": 16}, (64, 16)), ({"num_heads": 4}, (128, 128))],
)
def test_head_widths(values, widths):
    config = ModelConfig(**values)
    assert (config.key_width, config.value_width) == widths
