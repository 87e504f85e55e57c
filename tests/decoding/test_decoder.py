"""The compiled decode: as the model says, in few shapes, the same on any mesh and in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import ConfigError, DecodingConfig, MeshConfig, ModelConfig
from tfm.data.tokenizer import BOS, EOS, PAD, UNK
from tfm.decoding.decoder import Bucket, Decoder, unstack_axes
from tfm.model.attention import Tokens
from tfm.model.transformer import Transformer, abstract_parameters, init_parameters, unstack
from tfm.sharding import make_mesh, unboxed

VOCAB = 100
EXTRA = 6
MODEL = Transformer(
    ModelConfig(d_model=16, d_ff=32, num_heads=4, d_v=2, encoder_layers=1, decoder_layers=1, norm="pre"), VOCAB
)
CONFIG = DecodingConfig(max_source_length=24, tokens_per_batch=128, max_extra_tokens=EXTRA)
BANNED = (PAD, BOS, UNK)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def parameters():
    """Larger than a fresh model's, so that the likeliest token depends on what was said and on the source."""
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, jax.jit(lambda: init_parameters(MODEL, 1))())


@pytest.fixture(scope="module")
def decoder(parameters) -> Decoder:
    decoder = Decoder(MODEL, one_device(), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    return decoder


@pytest.fixture(scope="module")
def sentences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, VOCAB, n).tolist(), EOS] for n in (3, 9, 1, 15, 5, 12)]


def hypotheses(decoder: Decoder, bucket: Bucket, sentences) -> list[tuple[list[int], float]]:
    """(tokens, log-probability) of each sentence."""
    tokens, lengths, log_probs = (np.asarray(part)[:, 0] for part in decoder.decode(bucket, sentences))
    assert tokens.shape == (bucket.rows, bucket.source_length + decoder.config.max_extra_tokens)
    assert np.all(np.isfinite(log_probs))
    return [(tokens[i, : lengths[i]].tolist(), float(log_probs[i])) for i in range(len(sentences))]


@pytest.fixture(scope="module")
def decoded(decoder, sentences):
    return hypotheses(decoder, decoder.buckets[0], sentences)


def test_decoding_is_the_model_s_own_greedy_path(parameters, sentences, decoded):
    """Against the uncached model over whole rows, token by token, in NumPy."""
    length = 16 + EXTRA

    @jax.jit
    def logits(source, source_segments, target):
        def place(segments):
            return Tokens(segments, jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape))

        x = MODEL.apply({"params": parameters}, source, place(source_segments), target, place(jnp.ones_like(target)))
        return MODEL.apply({"params": parameters}, x, method="logits")

    source = np.zeros((len(sentences), 16), np.int32)
    for row, sentence in zip(source, sentences, strict=True):
        row[: len(sentence)] = sentence
    target = np.full((len(sentences), length), BOS, np.int32)
    log_probs, ended = np.zeros(len(sentences)), np.zeros(len(sentences), bool)
    said: list[list[int]] = [[] for _ in sentences]
    for t in range(length):
        scores = np.asarray(logits(source, (source > 0).astype(np.int32), target)[:, t], np.float64)[:, :VOCAB]
        scores[:, list(BANNED)] = -np.inf
        best = scores.argmax(-1)
        log_prob = scores.max(-1) - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) - scores.max(-1)
        for i, sentence in enumerate(sentences):
            if not ended[i]:
                log_probs[i] += log_prob[i]
                if best[i] != EOS:
                    said[i].append(int(best[i]))
                ended[i] = best[i] == EOS or len(said[i]) == len(sentence) - 1 + EXTRA
        if t + 1 < length:
            target[:, t + 1] = best
    assert [tokens for tokens, _ in decoded] == said
    np.testing.assert_allclose([log_prob for _, log_prob in decoded], log_probs, rtol=1e-4, atol=1e-4)
    assert len({tuple(tokens) for tokens in said}) == len(said)  # the source matters, or all this would show nothing


def test_company_and_place_change_no_bit(decoder, sentences, decoded):
    bucket = decoder.buckets[0]
    assert hypotheses(decoder, bucket, sentences[::-1]) == decoded[::-1]
    for sentence, expected in zip(sentences, decoded, strict=True):
        assert hypotheses(decoder, bucket, [sentence]) == [expected]
    assert hypotheses(decoder, bucket, [sentences[0]] * 4) == [decoded[0]] * 4


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 2, 4)])
def test_eight_devices_decode_as_one(parameters, sentences, decoded, mesh):
    decoder = Decoder(MODEL, make_mesh(mesh), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    sharded = hypotheses(decoder, decoder.buckets[0], sentences)
    assert [tokens for tokens, _ in sharded] == [tokens for tokens, _ in decoded]
    np.testing.assert_allclose([p for _, p in sharded], [p for _, p in decoded], rtol=1e-4, atol=1e-4)


def test_a_limit_is_the_source_s_length_and_so_many_tokens_more(parameters, sentences):
    """With the end symbol ruled out every translation runs into its limit; 50 is the default, as in the paper."""
    config = DecodingConfig(max_source_length=16, tokens_per_batch=128)
    decoder = Decoder(MODEL, one_device(), config, (*BANNED, EOS))
    decoder.set_parameters(parameters)
    found = hypotheses(decoder, decoder.buckets[0], sentences)
    assert [len(tokens) for tokens, _ in found] == [len(sentence) - 1 + 50 for sentence in sentences]
    assert not {PAD, BOS, UNK, EOS} & {token for tokens, _ in found for token in tokens}
    assert max(token for tokens, _ in found for token in tokens) < VOCAB  # the table has 128 rows


def test_what_is_banned_is_never_generated(parameters, sentences, decoded):
    often = sorted({token for tokens, _ in decoded for token in tokens})
    assert often
    decoder = Decoder(MODEL, one_device(), CONFIG, (*BANNED, *often))
    decoder.set_parameters(parameters)
    found = hypotheses(decoder, decoder.buckets[0], sentences)
    assert not set(often) & {token for tokens, _ in found for token in tokens}


def test_rows_that_only_fill_the_batch_say_nothing(decoder, sentences):
    _, lengths, log_probs = decoder.decode(decoder.buckets[0], sentences[:1])
    assert not np.asarray(lengths)[1:].any() and not np.asarray(log_probs)[1:].any()


def test_more_sentences_than_rows_are_an_error(decoder, sentences):
    with pytest.raises(IndexError):
        decoder.decode(decoder.buckets[0], [sentences[0]] * (decoder.buckets[0].rows + 1))


def test_each_shape_is_compiled_once(parameters, sentences):
    decoder = Decoder(MODEL, one_device(), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    assert decoder.compile_seconds == {}
    for count in (1, 3, 2):
        decoder.decode(decoder.buckets[0], sentences[:count])
    decoder.set_parameters(jax.tree.map(lambda p: p / 2, parameters))  # as validation does, again and again
    decoder.decode(decoder.buckets[0], sentences)
    assert list(decoder.compile_seconds) == [decoder.buckets[0]]
    assert decoder.compile_seconds[decoder.buckets[0]] > 0


@pytest.mark.parametrize(
    ("mesh", "config", "expected"),
    [
        (MeshConfig(1, 1, 1), DecodingConfig(max_source_length=64, tokens_per_batch=256), [(16, 16), (8, 32), (4, 64)]),
        (MeshConfig(2, 2, 2), DecodingConfig(max_source_length=40, tokens_per_batch=100), [(4, 16), (4, 32), (4, 40)]),
        (MeshConfig(8, 1, 1), DecodingConfig(max_source_length=10, tokens_per_batch=10), [(8, 10)]),
        (MeshConfig(1, 1, 1), DecodingConfig(max_source_length=16, tokens_per_batch=40), [(2, 16)]),
    ],
)
def test_buckets(mesh, config, expected):
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    decoder = Decoder(MODEL, make_mesh(mesh, devices), config, BANNED)
    assert decoder.buckets == expected
    for length in range(1, config.max_source_length + 1):
        bucket = decoder.bucket_of(length)
        assert length <= bucket.source_length
        assert not any(length <= other.source_length < bucket.source_length for other in decoder.buckets)
    with pytest.raises(ValueError, match=f"{config.max_source_length + 1} source tokens"):
        decoder.bucket_of(config.max_source_length + 1)


def test_a_beam_is_refused():
    with pytest.raises(ConfigError, match=r"decoding\.beam_size=4"):
        Decoder(MODEL, one_device(), DecodingConfig(beam_size=4), BANNED)


def test_parameters_are_laid_out_in_the_compute_type():
    """Norms stay float32; everything else is what matrix products multiply."""
    model = dataclasses.replace(MODEL, dtype=jnp.dtype("bfloat16"))
    decoder = Decoder(model, make_mesh(MeshConfig(2, 2, 2)), CONFIG, BANNED)
    laid_out = jax.eval_shape(decoder._laid_out, unboxed(abstract_parameters(model)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out):
        assert leaf.dtype == ("float32" if "norm" in jax.tree_util.keystr(path) else "bfloat16"), path


def test_axes_are_cut_as_parameters_are():
    boxed = abstract_parameters(MODEL)
    cut, shapes = unstack_axes(boxed), jax.eval_shape(unstack, unboxed(boxed))
    is_box = dict(is_leaf=lambda x: hasattr(x, "names"))
    assert jax.tree.structure(jax.tree.map(lambda _: 0, cut, **is_box)) == jax.tree.structure(shapes)
    for box, shape in zip(jax.tree.leaves(cut, **is_box), jax.tree.leaves(shapes), strict=True):
        assert len(box.names) == shape.ndim and "layers" not in box.names


def test_a_decoder_can_be_made_where_a_mesh_is_set():
    """As the training loop does, whose mesh is in scope throughout."""
    mesh = make_mesh(MeshConfig(8, 1, 1))
    with jax.set_mesh(mesh):
        assert Decoder(MODEL, mesh, CONFIG, BANNED).buckets
