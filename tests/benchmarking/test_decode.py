"""What is timed is the Decoder's own search, for translations of a known length."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tfm import device_memory
from tfm.benchmarking import decode
from tfm.benchmarking.decode import DecodeTiming, time_decoding
from tfm.decoding.decoder import Decoder
from tfm.device_memory import OutOfDeviceMemory
from tfm.model.flops import decode_step_flops, prefill_flops

LENGTH = 6
TIMING = DecodeTiming(length=LENGTH, steps=3, warmup=1)


def timed_on(devices, tiny, make_peak, **more):
    return time_decoding(tiny, devices, TIMING, make_peak(devices, jnp.dtype("float32")), **more)


@pytest.fixture(scope="module", params=[1, 2])
def beams(request):
    return request.param


@pytest.fixture(scope="module")
def timed(beams, tiny, make_peak):
    return timed_on(jax.devices()[:1], tiny, make_peak, beams=beams, sentences=3)


@pytest.fixture(scope="module")
def steps(beams):
    """Greedy search, of whose translations nobody wants the scores, needs no step for an end that is forced."""
    return LENGTH + (beams > 1)


def test_rates_belong_to_the_search(timed, steps):
    seconds = timed["search_seconds_median"]
    assert timed["sentences_per_second"] * seconds == pytest.approx(3)
    assert timed["target_tokens_per_second"] * seconds == pytest.approx(3 * steps)
    assert timed["search_seconds_p10"] <= seconds <= timed["search_seconds_p90"]
    assert timed["compile_seconds"] > timed["compile_backend_seconds"] > 0
    assert (timed["rows_per_batch"], timed["row_padding"]) == (3, 0)


def test_the_first_token_and_the_further_steps_make_up_the_search(tiny, make_peak, monkeypatch):
    def times(full, empty, timing):
        full(), empty()
        return [0.9, 1.0, 1.1], [0.4, 0.4, 0.7]

    monkeypatch.setattr(decode, "_timed", times)
    timed = timed_on(jax.devices()[:1], tiny, make_peak, beams=1, sentences=3)
    assert timed["step_seconds_median"] == pytest.approx((1.0 - 0.4) / (LENGTH - 1))
    assert timed["first_token_seconds_median"] == pytest.approx(0.4)

    # However little the first one took.
    monkeypatch.setattr(decode, "_timed", lambda *_: (times(*_)[0], [0.01]))
    timed = timed_on(jax.devices()[:1], tiny, make_peak, beams=1, sentences=3)
    assert timed["step_seconds_median"] == pytest.approx((1.0 - 0.01) / (LENGTH - 1))

    monkeypatch.setattr(decode, "_timed", lambda *_: (times(*_)[0], [1.2]))  # lost in noise
    timed = timed_on(jax.devices()[:1], tiny, make_peak, beams=1, sentences=3)
    assert timed["step_seconds_median"] is None


def test_one_token_has_no_further_step(tiny, make_peak):
    few = dataclasses.replace(tiny, decoding=dataclasses.replace(tiny.decoding, sentences_per_batch=1))
    peak = make_peak(jax.devices()[:1], jnp.dtype("float32"))
    timing = DecodeTiming(length=1, steps=1, warmup=0)
    timed = time_decoding(few, jax.devices()[:1], timing, peak, beams=1, sentences=3)
    assert timed["rows_per_batch"] == 3 and timed["search_seconds_median"] > 0
    assert timed["step_seconds_median"] is None


def test_flops_are_the_formula_s_and_xla_s_are_near(timed, beams, steps, tiny):
    """The first step is of one hypothesis, which attends to the slots of all."""
    room = LENGTH + 1
    of_steps = decode_step_flops(tiny.model, 100, 3, 1, LENGTH + 1, beams * room)
    of_steps += (steps - 1) * decode_step_flops(tiny.model, 100, 3, beams, LENGTH + 1, room)
    assert timed["model_flops"] == prefill_flops(tiny.model, 3, LENGTH + 1) + of_steps
    assert 1.0 < timed["hardware_flops"] / timed["model_flops"] < 1.5
    assert timed["mfu"] == pytest.approx(
        timed["model_flops"] / timed["search_seconds_median"] / timed["matmul_peak_flops"]
    )


def test_the_searches_are_the_decoder_s(tiny, make_peak, monkeypatch):
    """Warm-up, timed ones and the one that is looked at; on sentences and on padding in turn; one program for all."""
    calls, decoders, search = [], set(), Decoder.decode

    def recorded(self, bucket, sentences):
        calls.append(len(sentences))
        decoders.add(self)
        return search(self, bucket, sentences)

    monkeypatch.setattr(Decoder, "decode", recorded)
    timed_on(jax.devices()[:1], tiny, make_peak, beams=1, sentences=3)
    assert calls == [3, 0] * 4 + [3]
    (decoder,) = decoders
    assert len(decoder.compile_stages) == 1


def test_padding_alone_is_one_step(tiny):
    """That is what tells the first token from the others."""
    from tfm.sharding import make_mesh

    mesh = make_mesh(tiny.mesh, jax.devices()[:1])
    for beams in (1, 2):
        decoder, bucket = decode._decoder(tiny, mesh, LENGTH, beams, 3)
        found = decoder.decode(bucket, [])
        assert not found.lengths_BW.any()
        assert found.tokens_BWT.shape[2] == LENGTH + 1
        steps, step = [], decoder._step

        def counted(*arguments, step=step, steps=steps):
            jax.debug.callback(lambda: steps.append(1))
            return step(*arguments)

        decoder._step = counted
        decoder._compiled.clear()
        jax.block_until_ready(decoder.decode(bucket, []))
        jax.effects_barrier()
        assert len(steps) == 1
        jax.block_until_ready(decoder.decode(bucket, [[4] * LENGTH + [1]]))
        jax.effects_barrier()
        assert len(steps) == 1 + LENGTH + (beams > 1)


@pytest.mark.parametrize("beams", [1, 2])
def test_one_sentence_on_two_devices_needs_a_row_on_each_and_further_steps_of_one(tiny, make_peak, beams):
    one, two = (timed_on(jax.devices()[:n], tiny, make_peak, beams=beams, sentences=1) for n in (1, 2))
    assert (two["sentences"], two["rows_per_batch"], two["row_padding"]) == (1, 2, 0.5)
    assert two["collectives"] == {}
    # A device that has padding alone leaves after its first step: all that is computed twice.
    first = prefill_flops(tiny.model, 1, LENGTH + 1)
    first += decode_step_flops(tiny.model, 100, 1, 1, LENGTH + 1, beams * (LENGTH + 1))
    assert two["model_flops"] == one["model_flops"] + first
    assert 1 < two["hardware_flops"] / one["hardware_flops"] < 1.7


def test_sentences_that_do_not_fit_at_once_are_told_with_how_many_do(tiny, make_peak, monkeypatch):
    monkeypatch.setattr(device_memory, "room_of", lambda device: 0)
    peak = make_peak(jax.devices()[:1], jnp.float32)
    message = r"a search over 3 sentences of 5 tokens with beams of 2: needs .* GiB .*; not even one fits$"
    with pytest.raises(OutOfDeviceMemory, match=message):
        time_decoding(tiny, jax.devices()[:1], DecodeTiming(length=4, steps=1), peak, beams=2, sentences=3)
