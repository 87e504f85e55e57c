"""What a manifest says of a checkpoint, and that whatever differs from it is noticed."""

import json
import os
import shutil

import pytest

from tests.checkpoint.states import abstract, array_file, assert_same, cut_short, flip_bit, listing, small_state
from tfm.checkpoint import Checkpointer, CheckpointReader


def remove_file(directory):
    path = array_file(directory)
    path.unlink()
    return path.name


def add_file(directory):
    (directory / "parameters" / "more").write_text("")
    return "parameters/more"


def link_file(directory):
    path = array_file(directory)
    shutil.move(path, directory.parent.parent / "elsewhere")
    path.symlink_to(directory.parent.parent / "elsewhere")
    return f"{path.name} is a link"


def link_directory(directory):
    shutil.move(directory / "optimizer", directory.parent.parent / "elsewhere")
    (directory / "optimizer").symlink_to(directory.parent.parent / "elsewhere")
    return "optimizer is a link"


def link_step(directory):
    shutil.move(directory, directory.parent.parent / "elsewhere")
    directory.symlink_to(directory.parent.parent / "elsewhere")
    return "the directory is a link"


def link_manifest(directory):
    shutil.move(directory / "manifest.json", directory.parent.parent / "elsewhere")
    (directory / "manifest.json").symlink_to(directory.parent.parent / "elsewhere")
    return "manifest.json is a link"


def make_pipe(directory):
    os.mkfifo(directory / "parameters" / "pipe")
    return "parameters/pipe is neither a file nor a directory"


def flip_bit_in_manifest(directory):
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"metric": -3.0', b'"metric": -1.0'))
    return "manifest.json does not match its own checksum"


def escape(directory):
    """A manifest that is whole, and names a file of somebody else."""
    from tfm.checkpoint import manifest as manifests

    manifest = manifests.read(directory)
    manifest.files["../1/manifest.json"] = {"sha256": "0" * 64, "size": 1}
    manifests.write(directory, manifest)
    return "../1/manifest.json, which is outside the checkpoint"


DAMAGES = [
    *(flip_bit, cut_short, remove_file, add_file, link_file, link_directory, link_step, link_manifest, make_pipe),
    *(flip_bit_in_manifest, escape),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_damage_is_noticed_and_named_the_step_before_used_and_nothing_lost(copy, damage, caplog):
    newest = copy.checkpoints_path / "3"
    named = damage(newest)
    before = listing(copy.path)
    aside = listing(newest)

    restored = CheckpointReader(copy).restore(abstract(small_state(0)))
    assert restored.step == 2
    assert_same(restored.state, small_state(2))
    assert f"{newest}: damaged, not used" in caplog.text and named in caplog.text
    parameters = CheckpointReader(copy).restore_parameters(abstract(small_state(0)["parameters"]), "last")
    assert parameters.step == 2
    assert listing(copy.path) == before  # a reader changes nothing

    with Checkpointer(copy) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))).step == 2
        assert not os.path.lexists(newest)
        assert listing(copy.checkpoints_path / "damaged" / "3") == aside
        checkpointer.save(3, small_state(3))
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 3
    assert listing(copy.checkpoints_path / "damaged" / "3") == aside


def test_a_kill_while_a_manifest_is_written_anew_damages_nothing(copy):
    """What the kill leaves is no file of the checkpoint's, and is in nobody's way."""
    (copy.checkpoints_path / "3" / ".manifest.json.123.tmp").write_bytes(b"{")
    assert CheckpointReader(copy).restore(abstract(small_state(0))).step == 3
    with Checkpointer(copy) as checkpointer:
        assert checkpointer.resume(abstract(small_state(0))).step == 3
    assert not (copy.checkpoints_path / "damaged").exists()


def test_a_manifest_says_what_is_there(copy):
    manifest = json.loads((copy.checkpoints_path / "3" / "manifest.json").read_bytes())
    assert manifest["step"] == 3 and manifest["metric"] == -3.0 and manifest["format"] == 1
    assert manifest["arrays"]["parameters/w"] == "float32[4,6]"
    files = {
        str(p.relative_to(copy.checkpoints_path / "3")) for p in (copy.checkpoints_path / "3").rglob("*") if p.is_file()
    }
    assert manifest["files"].keys() == files - {"manifest.json"}
