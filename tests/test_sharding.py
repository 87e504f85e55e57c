"""Where arrays lie, what is refused, and that no mesh changes a loss or a gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tfm import sharding
from tfm.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tfm.data.batches import Batch
from tfm.model.transformer import Transformer, abstract_parameters
from tfm.training.step import Trainer

MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)]
CONFIG = Config(
    model=ModelConfig(
        d_model=16,
        d_ff=32,
        num_heads=8,
        encoder_layers=1,
        decoder_layers=1,
        norm="pre",
        tie_embeddings="target",
        attention_dropout_rate=0.1,
        activation_dropout_rate=0.1,
        token_dropout_rate=0.1,
    ),
    data=DataConfig(source_row_length=12, target_row_length=10),
    training=TrainingConfig(target_tokens_per_batch=80),
)
VOCAB = 100


def spec(*axes) -> PartitionSpec:
    return PartitionSpec(*axes)


# Names and meshes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("vocab", "embed"), spec("tensor", "fsdp")),
        (("layers", "embed", "heads", "kv"), spec(None, "fsdp", "tensor", None)),
        (("activation_batch", "activation_length", None), spec(("data", "fsdp"), None, None)),
        ((), spec()),
    ],
)
def test_names_map_to_mesh_axes(names, expected):
    assert sharding.spec_of(names) == expected


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd' in \('vocab', 'embd'\): known are embed, heads"):
        sharding.spec_of(("vocab", "embd"))


@pytest.mark.parametrize(
    ("names", "axis"),
    [
        (("heads", "embed", "mlp"), "tensor"),
        (("activation_batch", "embed"), "fsdp"),
        (("vocab", None, "vocab"), "tensor"),
    ],
)
def test_two_names_on_one_mesh_axis_are_refused_and_both_named(names, axis):
    with pytest.raises(ValueError) as refusal:
        sharding.spec_of(names)
    assert f"{names[0]!r} and {names[-1]!r} of one array" in str(refusal.value)
    assert f"both map to mesh axis {axis!r}" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 2, -1), (1, 2, 4)),
        (MeshConfig(4, 2, 1), (4, 2, 1)),
        (MeshConfig(-1, 8, 1), (1, 8, 1)),
    ],
)
def test_a_mesh_takes_all_devices(config, shape):
    mesh = sharding.make_mesh(config)
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(4, 4, 1), "mesh.data=4, mesh.fsdp=4, mesh.tensor=1: needs 16 devices, and there are 8"),
        (MeshConfig(2, 1, 1), "mesh.data=2, mesh.fsdp=1, mesh.tensor=1: needs 2 devices, and there are 8"),
        (
            MeshConfig(-1, 3, 1),
            "mesh.data=-1, mesh.fsdp=3, mesh.tensor=1: 8 devices cannot be divided by 3: they can be by 1, 2, 4 or 8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ConfigError) as refusal:
        sharding.make_mesh(config)
    assert str(refusal.value) == message


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of a slice of TPUs, as far as the placement of a mesh looks at it."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def chips(kind: str, grid: tuple[int, ...], index: int = 0) -> list[Chip]:
    places = itertools.product(*map(range, grid))
    return [Chip(1000 * index + i, (*place, 0, 0)[:3], kind, index) for i, place in enumerate(places)]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite", "TPU v5"])
def test_a_mesh_axis_may_take_a_part_of_an_axis_of_the_grid(kind):
    grid = (4, 4, 4) if kind == "TPU v5" else (16, 16)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), chips(kind, grid))
    assert mesh.devices.shape == (int(np.prod(grid)) // 2, 2, 1)
    for a, b in mesh.devices[:, :, 0]:
        assert sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1  # neighbours


def test_fsdp_never_crosses_slices():
    devices = [chip for index in range(2) for chip in chips("TPU v5 lite", (16, 16), index)]
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, slices=2), devices)
    assert mesh.devices.shape == (128, 4, 1)
    assert all(len({chip.slice_index for chip in row}) == 1 for row in mesh.devices[:, :, 0])


def test_machines_of_gpus_are_no_slices():
    """JAX numbers them as if they were; any axis may cross them."""
    devices = [Chip(i, (i,), "NVIDIA H100 80GB HBM3", i // 8, "gpu", process_index=i // 8) for i in range(32)]
    for config in (MeshConfig(), MeshConfig(data=1, fsdp=16, tensor=2)):
        mesh = sharding.make_mesh(config, devices)
        assert [chip.id for chip in mesh.devices.flat] == list(range(32))
    assert sharding.decoding_mesh(2, devices).devices.shape == (16, 1, 2)
    with pytest.raises(ConfigError, match=r"mesh\.slices=4: the devices are in 1 slices"):
        sharding.make_mesh(MeshConfig(slices=4), devices)


def test_decoding_takes_all_slices_and_splits_no_model_over_two(caplog):
    devices = [chip for index in range(2) for chip in chips("TPU v5 lite", (4, 4), index)]
    mesh = sharding.decoding_mesh(2, devices)
    assert mesh.devices.shape == (16, 1, 2)
    assert all(len({chip.slice_index for chip in row}) == 1 for row in mesh.devices[:, 0])
    assert not caplog.messages
    assert sharding.decoding_mesh(32, devices).devices.shape == (32, 1, 1)
    assert caplog.messages == ["mesh.tensor=32: decodes with 1, since there are 32 devices in 2 slices"]


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "activation_batch", "activation_embed") is x


# Parameters and optimizer state -------------------------------------------------------------------------------------


def trainer_of(config: Config, mesh: jax.sharding.Mesh) -> Trainer:
    return Trainer(config, Transformer(config.model, VOCAB), mesh)


def test_parameters_lie_as_their_axes_say():
    trainer = trainer_of(CONFIG, sharding.make_mesh(MeshConfig(2, 2, 2)))
    parameters = trainer.state_shardings.parameters
    layers = parameters["decoder"]["layers"]
    assert parameters["target_embedding"]["table"].spec == spec("tensor", "fsdp")
    assert layers["cross_attention"]["key"]["kernel"].spec == spec(None, "fsdp", "tensor", None)
    assert layers["self_attention"]["output"]["kernel"].spec == spec(None, "tensor", None, "fsdp")
    assert layers["feed_forward"]["inner"]["kernel"].spec == spec(None, "fsdp", "tensor")
    assert layers["feed_forward"]["inner"]["bias"].spec == spec(None, "tensor")
    assert parameters["encoder"]["final_norm"]["norm"]["scale"].spec == spec("fsdp")


def test_a_state_is_born_sharded():
    trainer = trainer_of(CONFIG, sharding.make_mesh(MeshConfig(2, 2, 2)))
    state = trainer.init()
    table = state.parameters["target_embedding"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(64, 8)}
    moments = state.optimizer[0].mu["target_embedding"]["table"]
    assert moments.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(1, 1, 8),
            "parameter ['decoder']['layers']['cross_attention']['key']['kernel'] has 4 along 'heads', which "
            "mesh.tensor=8 does not divide: mesh.tensor can be 1, 2 or 4",
        ),
        (
            MeshConfig(1, 8, 1),
            "parameter ['decoder']['final_norm']['norm']['bias'] has 12 along 'embed', which "
            "mesh.fsdp=8 does not divide: mesh.fsdp can be 1, 2 or 4",
        ),
    ],
)
def test_a_dimension_that_does_not_divide_is_refused_and_named(mesh, message):
    """The first such parameter, in the order of their names."""
    config = dataclasses.replace(CONFIG.model, d_model=12, num_heads=4)
    boxed = abstract_parameters(Transformer(config, VOCAB))
    with pytest.raises(ConfigError) as refusal:
        sharding.parameter_shardings(sharding.make_mesh(mesh), sharding.unboxed(boxed), sharding.logical_axes(boxed))
    assert str(refusal.value) == message


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_s_moments_lie_as_their_parameters(name):
    optimizer = OptimizerConfig(name=name, clip_norm=1.0, weight_decay=0.01 if name == "adamw" else 0.0)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    trainer = trainer_of(config, sharding.make_mesh(MeshConfig(2, 2, 2)))
    (adam,) = [part for part in trainer.state_shardings.optimizer if hasattr(part, "mu")]
    assert adam.mu == adam.nu == trainer.state_shardings.parameters
    assert adam.count.spec == spec()
    assert jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state) == trainer.state_shardings


def test_adafactor_s_statistics_lie_as_their_parameters_without_the_reduced_axis():
    """Wide enough to be factored, which starts at 128; nothing of it is allocated."""
    model = dataclasses.replace(CONFIG.model, d_model=128, d_ff=256, encoder_layers=3)
    config = dataclasses.replace(CONFIG, model=model, optimizer=OptimizerConfig(name="adafactor"))
    trainer = trainer_of(config, sharding.make_mesh(MeshConfig(2, 2, 2)))
    statistics = {"v_row": {}, "v_col": {}, "v": {}}
    shapes = jax.tree_util.tree_leaves_with_path(trainer.abstract_state.optimizer)
    for (path, leaf), where in zip(shapes, jax.tree.leaves(trainer.state_shardings.optimizer), strict=True):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        for kind in statistics:
            if kind in names:
                statistics[kind]["/".join(names[names.index(kind) + 1 :])] = (leaf.shape, where.spec)
        assert len(where.spec) <= leaf.ndim
    rows, columns, whole = statistics["v_row"], statistics["v_col"], statistics["v"]
    inner = "encoder/layers/feed_forward/inner/kernel"  # [3, 128 embed, 256 mlp]
    assert rows[inner] == ((3, 128), spec(None, "fsdp"))
    assert columns[inner] == ((3, 256), spec(None, "tensor"))
    outer = "encoder/layers/feed_forward/outer/kernel"  # [3, 256 mlp, 128 embed]
    assert rows[outer] == ((3, 128), spec(None, "fsdp"))
    assert columns[outer] == ((3, 256), spec(None, "tensor"))
    table = "target_embedding/table"  # [128 vocab, 128 embed]: of equals, rows lose the last and columns the first
    assert rows[table] == ((128,), spec("tensor"))
    assert columns[table] == ((128,), spec("fsdp"))
    query = "encoder/layers/self_attention/query/kernel"  # [3, 128 embed, 8 heads, 16 kv]: too narrow to be factored
    assert whole[query] == ((3, 128, 8, 16), spec(None, "fsdp", "tensor", None))
    assert rows[query] == ((3, 1), spec(None, None))


def test_of_equal_dimensions_adafactor_s_rows_lose_the_last():
    """What the shardings above take for granted, of Optax itself: gradients that differ along the first alone."""
    gradient = jnp.broadcast_to(jnp.arange(1.0, 129.0)[:, None], (128, 128))
    rule = optax.scale_by_factored_rms()
    state = rule.update({"p": gradient}, rule.init({"p": gradient}), {"p": gradient})[1]
    assert float(jnp.std(state.v_row["p"])) > 1
    np.testing.assert_allclose(state.v_col["p"], state.v_col["p"][0] * jnp.ones(128), rtol=1e-5)


def test_for_decoding_only_tensor_splits():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    axes = {"table": ("vocab", "embed"), "query": ("embed", "heads", "kv"), "norm": ("embed",)}
    assert sharding.decode_shardings(mesh, axes) == {
        "table": NamedSharding(mesh, spec("tensor", None)),
        "query": NamedSharding(mesh, spec(None, "tensor", None)),
        "norm": NamedSharding(mesh, spec(None)),
    }


# The same numbers on every mesh -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> Batch:
    """8 rows of two pairs and padding."""
    generator = np.random.default_rng(0)
    source = np.tile([1] * 5 + [2] * 4 + [0] * 3, (8, 1)).astype(np.int32)
    target = np.tile([1] * 3 + [2] * 5 + [0] * 2, (8, 1)).astype(np.int32)
    target[3:, -2:] = 2

    def tokens(segments: np.ndarray) -> np.ndarray:
        return np.where(segments > 0, generator.integers(4, VOCAB, segments.shape), 0).astype(np.int32)

    def positions(segments: np.ndarray) -> np.ndarray:
        return np.stack([[list(row[:i]).count(s) for i, s in enumerate(row)] for row in segments]).astype(np.int32)

    outputs = tokens(target)
    inputs = np.where(target > 0, np.roll(outputs, 1, axis=1), 0)
    rows = np.arange(8, dtype=np.int32)
    return Batch(tokens(source), source, positions(source), inputs, outputs, target, positions(target), rows)


def loss_and_gradients(mesh: jax.sharding.Mesh, batch: Batch, logits_per_chunk: int = 2**22):
    trainer = trainer_of(CONFIG, mesh)
    trainer.logits_per_chunk = logits_per_chunk
    parameters = jax.jit(lambda: trainer._init().parameters, out_shardings=trainer.state_shardings.parameters)()
    batch_sharding, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    function = jax.jit(
        trainer.gradients,
        in_shardings=(trainer.state_shardings.parameters, batch_sharding, whole),
        out_shardings=(trainer.state_shardings.parameters, whole),
    )
    with jax.set_mesh(mesh):
        gradients, sums = function(parameters, jax.device_put(batch, batch_sharding), jnp.int32(3))
    return jax.tree.map(np.asarray, (gradients, sums))


@pytest.fixture(scope="module")
def on_one_device(batch):
    return loss_and_gradients(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), batch)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
def test_every_mesh_has_the_loss_and_the_gradients_of_one_device(mesh, batch, on_one_device, capfd):
    """Dropout is on at every site: its bits, too, are the same. So is the loss in as many pieces as there can be."""
    gradients, sums = loss_and_gradients(sharding.make_mesh(mesh), batch, logits_per_chunk=1)
    expected_gradients, expected = on_one_device
    assert sums.tokens == expected.tokens == 3 * 8 + 5 * 10
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    norm = float(optax.tree.norm(expected_gradients))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert np.abs(a - b).max() < 1e-5 * norm, jax.tree_util.keystr(path)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
