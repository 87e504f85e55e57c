"""`prepare` as a user types it."""

import shutil

from tfm.__main__ import main


def test_prepare_says_what_it_found(reversal, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(reversal, corpus)
    with (corpus / "train.en").open("ab") as source, (corpus / "train.de").open("ab") as target:
        source.write(b"\nred\xff\n")
        target.write(b"rot\nred\n")
    pattern = f"text:{corpus}/{{split}}.{{lang}}"
    argv = ["prepare", "--config=demo", f"--workdir={tmp_path / 'run'}", f"--data.corpus={pattern}"]
    assert main([*argv, "--data.vocab_size=300"]) == 0
    out = capsys.readouterr().out
    pairs = len((corpus / "train.en").read_bytes().split(b"\n")) - 1
    assert f"empty side: 1 pairs (line {pairs - 1})" in out
    assert f"bytes that are not UTF-8: 1 pairs (line {pairs})" in out
    assert (tmp_path / "run" / "store" / "manifest.json").is_file()
    assert main([*argv, "--data.vocab_size=290"]) == 2
    assert "vocab_size" in capsys.readouterr().err
    (shard,) = (tmp_path / "run" / "store").glob("0-*.shard")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main([*argv, "--data.vocab_size=300"]) == 2
    assert f"{shard.name}: its content is not what the manifest says" in capsys.readouterr().err


def test_prepare_leaves_nothing_of_a_corpus_it_refuses(reversal, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(reversal, corpus)
    (corpus / "train.de").write_text("rot\n")
    pattern = f"text:{corpus}/{{split}}.{{lang}}"
    argv = ["prepare", "--config=demo", f"--workdir={tmp_path / 'run'}", f"--data.corpus={pattern}"]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "train.en has" in err and "train.de has 1:" in err
    assert not (tmp_path / "run" / "store").exists()


def test_prepare_takes_the_tokenizer_of_the_run_that_training_starts_from(trained, tmp_path, capsys):
    """So that training, with the same options, finds the store that it needs."""
    argv = [f"--workdir={tmp_path / 'run'}", f"--training.initialize_from={trained}", "--training.steps=2"]
    config = tmp_path / "config.py"
    config.write_text(
        "from pathlib import Path\nfrom tfm.config import from_json\n"
        f"def get_config():\n    return from_json(Path({str(trained / 'config.json')!r}))\n"
    )
    assert main(["prepare", f"--config={config}", *argv]) == 0
    assert main(["train", f"--config={config}", *argv]) == 0
