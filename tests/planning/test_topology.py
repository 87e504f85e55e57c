"""Slices by name, and the time of collectives on their links by hand."""

import dataclasses
import itertools
from importlib.util import find_spec

import jax
import pytest

from tfm.chips import TPUS
from tfm.config import InputError
from tfm.hlo.collectives import Collective
from tfm.planning import topology
from tfm.planning.topology import TOPOLOGIES, collective_seconds, devices_of, topology_of

LINK = TPUS["v5e"].link_bandwidth


def seconds(name: str, kind: str, group, size: float = 1e9) -> float:
    where = topology_of(name)
    coordinates = list(itertools.product(*(range(n) for n in where.grid)))
    return collective_seconds(Collective(kind, 2, size, tuple(group)), where, coordinates)


def test_a_slice_by_its_name():
    found = topology_of("v5p:4x4x8")
    assert (found.chip, found.grid, found.chips) == (TPUS["v5p"], (4, 4, 8), 128)
    assert set(TOPOLOGIES) == set(TPUS)
    for kind, shapes in TOPOLOGIES.items():
        assert all(len(shape.split("x")) == (3 if kind in ("v4", "v5p") else 2) for shape in shapes)


@pytest.mark.parametrize("name", ["v5e:16x15", "v5e", "v9:2x2", "h100:8", ""])
def test_an_unknown_slice_is_refused_with_those_that_are_known(name):
    with pytest.raises(InputError, match=rf"--topology={name}: no such TPU topology.*v4:2x2x1.*v6e:16x16") as caught:
        topology_of(name)
    assert "\n" not in str(caught.value)
    if name == "v5e:16x15":
        assert "did you mean v5e:16x16?" in str(caught.value)


def test_between_slices_each_chip_has_its_share_of_the_network():
    for slices in (2, 4):
        where = dataclasses.replace(topology_of("v5e:2x2"), slices=slices)
        assert (where.chips, str(where)) == (4 * slices, f"{slices} x v5e:2x2")
        between = Collective("all-reduce-between-slices", 3, 1e9, tuple(range(0, 4 * slices, 4)))
        moved = 2e9 * (slices - 1) / slices
        assert collective_seconds(between, where, []) == pytest.approx(3 * moved / TPUS["v5e"].network_bandwidth)
    assert all(chip.network_bandwidth for chip in TPUS.values())


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-tpu\.txt"):
        devices_of(topology_of("v5e:4x4"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "another process is using libtpu"),
        ("INVALID_ARGUMENT:\n no such thing", "libtpu does not know it: INVALID_ARGUMENT: no such thing"),
    ],
)
def test_what_libtpu_refuses_is_said_in_one_line(reason, said, monkeypatch):
    def refuse(**options):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr(topology, "find_spec", lambda name: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    for name in (
        "TPU_SKIP_MDS_QUERY",
        "TPU_ACCELERATOR_TYPE",
        "TPU_WORKER_HOSTNAMES",
        "TPU_MIN_LOG_LEVEL",
        "TPU_STDERR_LOG_LEVEL",
    ):
        monkeypatch.setenv(name, "as it was")
    with pytest.raises(InputError) as caught:
        devices_of(topology_of("v5e:4x4"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rings_along_both_axes_of_a_whole_pod():
    assert seconds("v5e:16x16", "all-reduce", range(256)) == pytest.approx(2 * 2 * 1e9 * 255 / 256 / (4 * LINK))
    assert seconds("v5e:16x16", "all-gather", range(256)) == pytest.approx(2 * 1e9 * 255 / 256 / (4 * LINK))
    assert seconds("v5e:16x16", "reduce-scatter", range(256)) == pytest.approx(2 * 1e9 * 255 / 256 / (4 * LINK))


def test_an_axis_that_is_no_ring_has_half_the_bandwidth():
    assert seconds("v5e:4x4", "all-gather", range(16)) == pytest.approx(2 * 1e9 * 15 / 16 / (2 * LINK))
    assert seconds("v5e:8x16", "all-gather", range(128)) == pytest.approx(2 * 1e9 * 127 / 128 / (3 * LINK))


def test_three_axes_are_rings_in_whole_cubes_alone():
    link = TPUS["v5p"].link_bandwidth
    assert seconds("v5p:4x4x4", "all-gather", range(64)) == pytest.approx(2 * 1e9 * 63 / 64 / (6 * link))
    assert seconds("v5p:2x2x4", "all-gather", range(16)) == pytest.approx(2 * 1e9 * 15 / 16 / (3 * link))


def test_a_group_within_one_row_has_that_row_s_links():
    assert seconds("v5e:16x16", "all-gather", range(16)) == pytest.approx(2 * 1e9 * 15 / 16 / (2 * LINK))
    assert seconds("v5e:16x16", "all-gather", range(4)) == pytest.approx(2 * 1e9 * 3 / 4 / LINK)
    # Every other chip: the links between are shared with the group of the others.
    assert seconds("v5e:4x4", "all-gather", (0, 2)) == pytest.approx(2 * 1e9 / 2 / (LINK * 2 / 3))


def test_all_to_all_and_permutations():
    assert seconds("v5e:16x16", "all-to-all", range(16)) == pytest.approx(2 * 1e9 * 15 / 16 * 4 / (2 * LINK))
    assert seconds("v5e:16x16", "collective-permute", (0, 1)) == pytest.approx(2 * 1e9 / LINK)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for a TPU takes libtpu: requirements-tpu.txt")
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_libtpu_knows_the_slices(kind):
    for shape in (*TOPOLOGIES[kind][:4], TOPOLOGIES[kind][-1]):
        where = topology_of(f"{kind}:{shape}")
        devices = devices_of(where)
        assert len(devices) == where.chips
        places = topology.coordinates_of(devices, where)
        assert set(places) == set(itertools.product(*(range(n) for n in where.grid)))
