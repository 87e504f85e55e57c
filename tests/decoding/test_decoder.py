"""The compiled decode: as the model says, in few shapes, the same on any mesh and in any company."""

import dataclasses
import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.decoders import BANNED, BEAM, CONFIG, EXTRA, MODEL, VOCAB, one_device
from tfm.config import DecodingConfig, MeshConfig
from tfm.data.tokenizer import BOS, EOS, PAD, UNK
from tfm.decoding import decoder as module
from tfm.decoding.decoder import Bucket, Decoder, Sentences
from tfm.hlo.program import Program
from tfm.model.attention import Tokens
from tfm.model.transformer import Transformer, init_parameters
from tfm.planning.topology import devices_of, topology_of
from tfm.sharding import make_mesh

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


@pytest.fixture(scope="module")
def parameters():
    """Larger than a fresh model's, so that the likeliest token depends on what was said and on the source."""
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, jax.jit(lambda: init_parameters(MODEL, 1))())


@pytest.fixture(scope="module")
def decoder(parameters) -> Decoder:
    decoder = Decoder([MODEL], one_device(), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    return decoder


@pytest.fixture(scope="module")
def sentences() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[*generator.integers(4, VOCAB, n).tolist(), EOS] for n in (3, 9, 1, 15, 5, 12)]


def n_best_of(decoder: Decoder, sentences, bucket: Bucket | None = None) -> list[list[tuple[list[int], float]]]:
    """(tokens, log-probability) of each hypothesis of each sentence."""
    bucket = bucket or decoder.buckets[0]
    tokens, lengths, log_probs = map(np.asarray, decoder.decode(bucket, sentences)[:3])
    assert tokens.shape[0] == bucket.rows and tokens.shape[2] == bucket.room
    return [
        [(tokens[i, r, : lengths[i, r]].tolist(), float(log_probs[i, r])) for r in range(tokens.shape[1])]
        for i in range(len(sentences))
    ]


def hypotheses(decoder: Decoder, bucket: Bucket, sentences) -> list[tuple[list[int], float]]:
    """(tokens, log-probability) of the best hypothesis of each sentence."""
    best = [found[0] for found in n_best_of(decoder, sentences, bucket)]
    assert np.all(np.isfinite([log_prob for _, log_prob in best]))
    return best


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
        peak = scores.max(-1, keepdims=True)
        normalised = scores - peak - np.log(np.exp(scores - peak).sum(-1, keepdims=True))
        best = scores.argmax(-1)
        for i, sentence in enumerate(sentences):
            if not ended[i]:
                ended[i] = best[i] == EOS or len(said[i]) == len(sentence) - 1 + EXTRA
                log_probs[i] += normalised[i, EOS if ended[i] else best[i]]
                if not ended[i]:
                    said[i].append(int(best[i]))
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
    decoder = Decoder([MODEL], make_mesh(mesh), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    sharded = hypotheses(decoder, decoder.buckets[0], sentences)
    assert [tokens for tokens, _ in sharded] == [tokens for tokens, _ in decoded]
    np.testing.assert_allclose([p for _, p in sharded], [p for _, p in decoded], rtol=1e-4, atol=1e-4)


def test_a_limit_is_the_source_s_length_and_so_many_tokens_more(parameters, sentences):
    """With the end symbol ruled out every translation runs into its limit; 50 is the default, as in the paper."""
    config = DecodingConfig(beam_size=1, max_source_length=16, tokens_per_batch=384)
    decoder = Decoder([MODEL], one_device(), config, BANNED)
    # Not banned, since each translation ends in it after all.
    decoder._mean_of_models = lambda logits: logits[0].at[..., EOS].add(-1e4)
    decoder.set_parameters(parameters)
    assert not np.asarray(decoder.decode(decoder.buckets[0], sentences).is_whole_B)[: len(sentences)].any()
    found = hypotheses(decoder, decoder.long_buckets[0], sentences)
    assert [len(tokens) for tokens, _ in found] == [len(sentence) - 1 + 50 for sentence in sentences]
    assert not {PAD, BOS, UNK, EOS} & {token for tokens, _ in found for token in tokens}
    assert max(token for tokens, _ in found for token in tokens) < VOCAB  # the table has 128 rows


def test_what_is_banned_is_never_generated(parameters, sentences, decoded):
    often = sorted({token for tokens, _ in decoded for token in tokens})
    assert often
    decoder = Decoder([MODEL], one_device(), CONFIG, (*BANNED, *often))
    decoder.set_parameters(parameters)
    found = hypotheses(decoder, decoder.buckets[0], sentences)
    assert not set(often) & {token for tokens, _ in found for token in tokens}


def test_rows_that_only_fill_the_batch_say_nothing(decoder, sentences):
    tokens, lengths, *_ = map(np.asarray, decoder.decode(decoder.buckets[0], sentences[:1]))
    assert not lengths[1:].any() and np.all(tokens[1:] == EOS)


def test_more_sentences_than_rows_are_an_error(decoder, sentences):
    with pytest.raises(IndexError):
        decoder.decode(decoder.buckets[0], [sentences[0]] * (decoder.buckets[0].rows + 1))


def test_each_shape_is_compiled_once(parameters, sentences):
    decoder = Decoder([MODEL], one_device(), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    assert decoder.compile_stages == {}
    for count in (1, 3, 2):
        decoder.decode(decoder.buckets[0], sentences[:count])
    decoder.set_parameters(jax.tree.map(lambda p: p / 2, parameters))  # as validation does, again and again
    decoder.decode(decoder.buckets[0], sentences)
    assert list(decoder.compile_stages) == [("search", decoder.buckets[0], True)]
    assert min(decoder.compile_stages["search", decoder.buckets[0], True]) > 0


# Beams, samples, scores and several models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beam_decoder(parameters) -> Decoder:
    decoder = Decoder([MODEL], one_device(), BEAM, BANNED)
    decoder.set_parameters(parameters)
    return decoder


@pytest.fixture(scope="module")
def n_best(beam_decoder, sentences):
    return n_best_of(beam_decoder, sentences)


def scores_of(decoder: Decoder, sources, targets) -> list[float]:
    bucket = decoder.score_buckets[-1]
    found = np.asarray(decoder.score(bucket, sources, [[*target, EOS] for target in targets]))
    for row, target in zip(found, targets, strict=False):
        assert np.all(row[: len(target) + 1] < 0) and np.all(row[len(target) + 1 :] == 0)
    return found[: len(targets)].sum(axis=1).tolist()


def test_what_a_beam_search_says_of_its_hypotheses_is_what_scoring_says(beam_decoder, sentences, n_best):
    """The cache, in which beams are never moved, against a computation of all positions at once."""
    sources = [sentence for sentence, found in zip(sentences, n_best, strict=True) for _ in found]
    hypotheses = [hypothesis for found in n_best for hypothesis in found]
    for at in range(0, len(sources), 4):
        scores = scores_of(beam_decoder, sources[at : at + 4], [tokens for tokens, _ in hypotheses[at : at + 4]])
        np.testing.assert_allclose(scores, [p for _, p in hypotheses[at : at + 4]], rtol=1e-4, atol=1e-4)


def test_a_score_does_not_depend_on_the_row(parameters, sentences, monkeypatch):
    monkeypatch.setattr(module, "_SCORED_AT_ONCE", 4 * 16)  # 4 of 6 rows, and then 2, were another program
    decoder = Decoder([MODEL], one_device(), DecodingConfig(max_source_length=16, tokens_per_batch=6 * 16), BANNED)
    decoder.set_parameters(parameters)
    bucket = decoder.score_buckets[0]
    assert (bucket.rows, bucket.length) == (6, 16)
    rows = np.asarray(decoder.score(bucket, [sentences[0]] * 6, [[7, 5, EOS]] * 6))
    assert rows[0, :3].all() and (rows == rows[0]).all()


def test_the_n_best_are_sorted_distinct_and_no_worse_than_greedy(n_best, decoded):
    def score(hypothesis):
        tokens, log_prob = hypothesis
        return log_prob / ((5 + len(tokens) + 1) / 6) ** BEAM.length_penalty

    for found, greedy in zip(n_best, decoded, strict=True):
        scores = [score(hypothesis) for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(tokens) for tokens, _ in found}) == BEAM.n_best
        assert scores[0] >= score(greedy) - 1e-4
    assert any(found[0][0] != greedy[0] for found, greedy in zip(n_best, decoded, strict=True))


def test_beams_of_eight_devices_and_in_any_company_are_those_of_one(beam_decoder, parameters, sentences, n_best):
    assert n_best_of(beam_decoder, sentences[::-1]) == n_best[::-1]
    assert n_best_of(beam_decoder, sentences[2:3]) == n_best[2:3]
    decoder = Decoder([MODEL], make_mesh(MeshConfig(2, 2, 2)), BEAM, BANNED)
    decoder.set_parameters(parameters)
    sharded = n_best_of(decoder, sentences)
    assert [[t for t, _ in found] for found in sharded] == [[t for t, _ in found] for found in n_best]
    np.testing.assert_allclose(
        [[p for _, p in found] for found in sharded], [[p for _, p in found] for found in n_best], rtol=1e-4, atol=1e-4
    )


def test_a_device_stops_by_itself_without_a_word_to_the_others(parameters):
    """With tensor 1 the compiled search has no collective at all."""
    decoder = Decoder([MODEL], make_mesh(MeshConfig(4, 2, 1)), BEAM, BANNED)
    decoder.set_parameters(parameters)
    decoder.decode(decoder.buckets[0], [[5, EOS]])
    [program] = decoder._compiled.values()
    text = program.as_text()
    assert "while(" in text
    assert not re.search(COLLECTIVES, text)


@pytest.mark.parametrize("search", [CONFIG, BEAM, dataclasses.replace(CONFIG, sampling=True, n_best=2)])
def test_tensor_groups_end_when_they_are_done(sentences, search):
    """Four blocks of vocabulary on two devices, the last one padded: nothing is said beyond the pairs of devices."""
    model = Transformer(MODEL.config, 500)
    parameters = jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, jax.jit(lambda: init_parameters(model, 1))())
    found = []
    for mesh in (one_device(), make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])):
        decoder = Decoder([model], mesh, dataclasses.replace(search, tokens_per_batch=32), BANNED)
        decoder.set_parameters(parameters)
        bucket = decoder.buckets[0]
        assert bucket.rows == 2
        found.append([n_best_of(decoder, pair)[0][0] for pair in (sentences[:2], sentences[2:4], sentences[4:])])
    collectives = re.findall(
        rf"({COLLECTIVES})(?:-start)?\(.*?replica_groups=(\S+),", decoder.search_program(bucket).as_text()
    )
    assert {groups for _, groups in collectives} <= {"[2,2]<=[4]", "{{0,1},{2,3}}"} and collectives
    assert "collective-permute" not in decoder.search_program(bucket).as_text()
    assert [tokens for tokens, _ in found[0]] == [tokens for tokens, _ in found[1]]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
def test_on_a_slice_of_tpus_nothing_is_said_either_and_the_cache_is_updated_in_place():
    decoder = Decoder([MODEL], make_mesh(MeshConfig(), devices_of(topology_of("v5e:4x4"))), BEAM, BANNED)
    decoder._parameters = decoder.abstract_parameters()
    bucket = decoder.buckets[-1]
    rows = Sentences(np.zeros((bucket.rows, bucket.length), np.int32))
    text = decoder._program(partial(decoder._search, bucket), "search", bucket, rows).as_text()
    assert "while(" in text and not re.search(COLLECTIVES, text)
    cache = rf"\w+\[{bucket.rows // 16},{MODEL.config.num_heads},{bucket.room * BEAM.beam_size},\d+\]"
    bodies = [Program(text).computations[name] for name in re.findall(r"body=%?([\w.-]+)", text)]
    instructions = [its for body in bodies for its in body.instructions.values() if re.match(cache, its.shape)]
    assert sum("dynamic-update-slice" in its.opcode + its.name for its in instructions) == 2  # keys and values
    assert not [its.name for its in instructions if its.opcode.startswith("copy")]


def test_a_prefix_is_what_the_translation_begins_with(beam_decoder, sentences, n_best):
    prefixes = [[7, 8, 9], [], [50], [], [], [5] * 4]
    tokens, lengths, *_ = map(np.asarray, beam_decoder.decode(beam_decoder.buckets[0], sentences, prefixes))
    for row, prefix in enumerate(prefixes):
        assert tokens[row, 0, : len(prefix)].tolist() == prefix
        if not prefix:
            assert tokens[row, 0, : lengths[row, 0]].tolist() == n_best[row][0][0]


def test_samples_differ_by_draw_and_seed_and_not_by_company(parameters, sentences):
    def decoder_of(seed):
        config = dataclasses.replace(CONFIG, sampling=True, n_best=2, sampling_seed=seed)
        decoder = Decoder([MODEL], one_device(), config, BANNED)
        decoder.set_parameters(parameters)
        return decoder

    decoder, other = decoder_of(3), decoder_of(4)

    def drawn(which, draws, decoder=decoder):
        tokens = np.asarray(decoder.decode(decoder.buckets[0], [sentences[i] for i in which], None, draws)[0])
        return tokens[: len(which)].tolist()

    first = drawn([0, 1, 1, 1], [(10, 0), (11, 0), (12, 0), (11, 1)])
    assert drawn([1, 0], [(11, 0), (10, 0)]) == first[1::-1]
    assert first[1] != first[2] != first[3] != first[1] and first[0][0] != first[0][1]
    assert drawn([0, 1], [(10, 0), (11, 0)], other)[1] not in (first[1], first[0])


def test_two_models_of_the_same_parameters_translate_as_one(parameters, sentences, n_best):
    decoder = Decoder([MODEL, MODEL], one_device(), BEAM, BANNED)
    decoder.set_parameters(parameters, parameters)
    found = n_best_of(decoder, sentences)
    assert [[t for t, _ in of] for of in found] == [[t for t, _ in of] for of in n_best]
    scores = scores_of(decoder, sentences[:4], [of[0][0] for of in n_best[:4]])
    np.testing.assert_allclose(scores, [of[0][1] for of in n_best[:4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", ["log_probs", "probs"])
def test_what_models_say_together_is_the_mean_of_what_each_says(mean):
    decoder = Decoder([MODEL, MODEL], one_device(), dataclasses.replace(BEAM, ensemble_mean=mean), BANNED)
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(2, 3, 128)).astype(np.float32) for _ in range(2)]
    together = jax.nn.softmax(decoder._mean_of_models([jnp.asarray(part) for part in logits]), axis=-1)
    allowed = [i for i in range(VOCAB) if i not in BANNED]
    each = [np.exp(part[..., allowed]) / np.exp(part[..., allowed]).sum(-1, keepdims=True) for part in logits]
    expected = np.sqrt(each[0] * each[1]) if mean == "log_probs" else each[0] + each[1]
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(together)[..., allowed], expected, rtol=1e-5)
    assert not np.delete(np.asarray(together), allowed, axis=-1).any()
