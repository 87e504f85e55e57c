"""How a decoder is laid out, before it translates anything: shapes, options, and parameters on its devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.decoding.decoders import BANNED, BEAM, CONFIG, MODEL, one_device
from tfm.config import ConfigError, DecodingConfig, MeshConfig
from tfm.decoding import decoder as module
from tfm.decoding.decoder import Decoder, bucket_of
from tfm.model.transformer import abstract_parameters, init_parameters, unstack, unstack_axes
from tfm.sharding import make_mesh, unboxed


@pytest.mark.parametrize(
    ("mesh", "config", "expected"),
    [
        (MeshConfig(1, 1, 1), DecodingConfig(max_source_length=64, tokens_per_batch=256), [(16, 16), (8, 32), (4, 64)]),
        (MeshConfig(2, 2, 2), DecodingConfig(max_source_length=40, tokens_per_batch=100), [(4, 16), (4, 32), (4, 40)]),
        (MeshConfig(8, 1, 1), DecodingConfig(max_source_length=10, tokens_per_batch=10), [(8, 10)]),
        (MeshConfig(1, 1, 1), DecodingConfig(max_source_length=16, tokens_per_batch=40), [(2, 16)]),
        (MeshConfig(1, 1, 1), DecodingConfig(max_source_length=40, sentences_per_batch=1), [(1, 16), (1, 32), (1, 40)]),
        (MeshConfig(2, 1, 1), DecodingConfig(max_source_length=16, sentences_per_batch=7), [(6, 16)]),
    ],
)
def test_buckets(mesh, config, expected):
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    decoder = Decoder([MODEL], make_mesh(mesh, devices), config, BANNED)
    assert [(bucket.rows, bucket.length) for bucket in decoder.buckets] == expected
    for length in range(1, config.max_source_length + 1):
        bucket = bucket_of(decoder.buckets, length)
        assert length <= bucket.length
        assert not any(length <= other.length < bucket.length for other in decoder.buckets)
    with pytest.raises(ValueError, match=f"{config.max_source_length + 1} tokens"):
        bucket_of(decoder.buckets, config.max_source_length + 1)


def test_a_search_has_the_options_of_its_config(monkeypatch):
    given = {}

    def noting(search):
        return lambda *arguments, **options: given.update(options) or search(*arguments, **options)

    monkeypatch.setattr(module.search, "sample", noting(module.search.sample))
    monkeypatch.setattr(module, "beam_search", noting(module.beam_search))
    drawn = dataclasses.replace(CONFIG, sampling=True, n_best=2, sampling_temperature=0.7)
    drawn = dataclasses.replace(drawn, sampling_top_k=5, sampling_top_p=0.8)
    for config in (drawn, dataclasses.replace(BEAM, length_penalty=1.3)):
        decoder = Decoder([MODEL], one_device(), config, BANNED)
        bucket = decoder.buckets[0]
        search = partial(decoder._search, bucket)
        jax.eval_shape(search, decoder.abstract_parameters(), decoder._rows(bucket, []))
    expected = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "samples": 2, "alpha": 1.3, "beams": BEAM.beam_size}
    assert {name: given[name] for name in expected} == expected


def test_a_beam_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"decoding\.beam_size=98 is more than the 97 tokens"):
        Decoder([MODEL], one_device(), DecodingConfig(beam_size=98), BANNED)


def test_parameters_are_laid_out_in_the_compute_type():
    """Norms stay float32; everything else is what matrix products multiply."""
    model = dataclasses.replace(MODEL, dtype=jnp.dtype("bfloat16"))
    decoder = Decoder([model], make_mesh(MeshConfig(2, 2, 2)), CONFIG, BANNED)
    laid_out = jax.eval_shape(decoder._laid_out, (unboxed(abstract_parameters(model)),))
    for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out):
        assert leaf.dtype == ("float32" if "norm" in jax.tree_util.keystr(path) else "bfloat16"), path


def test_parameters_are_laid_out_once_those_before_are_gone(monkeypatch):
    parameters = jax.jit(lambda: init_parameters(MODEL, 1))()
    decoder = Decoder([MODEL], one_device(), CONFIG, BANNED)
    decoder.set_parameters(parameters)
    held, lay_out = [], decoder._lay_out
    monkeypatch.setattr(decoder, "_lay_out", lambda given: (held.append(decoder._parameters), lay_out(given))[1])
    decoder.set_parameters(parameters)
    assert held == [None]


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
        assert Decoder([MODEL], mesh, CONFIG, BANNED).buckets
