"""`evaluate` as a user types it."""

import json

from tfm.__main__ import main


def test_evaluate_scores_files_and_the_test_split_alike(trained, reversal, capsys, tmp_path):
    files = (f"--source={reversal / 'test.en'}", f"--reference={reversal / 'test.de'}")
    assert main(["evaluate", f"--workdir={trained}", *files, f"--output={tmp_path / 'out'}"]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", f"--workdir={trained}", "--json=-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sentences"] == 100
    assert report["steps"] == [4]
    for name in ("bleu", "chrf"):
        assert f"{name:<26} {report['scores'][name]['value']:6.2f}" in table
        assert "version:" in report["scores"][name]["signature"]
    assert len((tmp_path / "out").read_text().split("\n")) == 101


def test_evaluate_refuses_half_a_test_set(trained, reversal, capsys):
    assert main(["evaluate", f"--workdir={trained}", f"--source={reversal / 'test.en'}"]) == 2
    assert "--reference is missing" in capsys.readouterr().err
    files = (f"--source={reversal / 'test.en'}", f"--reference={reversal / 'train.de'}")
    assert main(["evaluate", f"--workdir={trained}", *files]) == 2
    assert "100 lines" in capsys.readouterr().err


def test_translations_on_standard_output_are_all_that_is_there(trained, capfdbinary, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("red blue\n")
    argv = ["evaluate", f"--workdir={trained}", f"--source={tmp_path / 'a'}", f"--reference={tmp_path / 'b'}"]
    assert main([*argv, "--output=-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out.count(b"\n") == 1 and b"bleu " not in out and b"bleu " in err


def test_translations_are_kept_where_scores_cannot_be_written(trained, capsys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("red blue\n")
    argv = ["evaluate", f"--workdir={trained}", f"--source={tmp_path / 'a'}", f"--reference={tmp_path / 'b'}"]
    assert main([*argv, f"--output={tmp_path / 'out'}", "--json=/dev/full"]) == 2
    assert "/dev/full: cannot be written: No space left" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1


def test_evaluate_leaves_earlier_results_where_it_cannot_run(trained, capsys, tmp_path):
    for name in ("scores.json", "out"):
        (tmp_path / name).write_text("earlier")
    argv = ["evaluate", f"--workdir={trained}", f"--json={tmp_path / 'scores.json'}"]
    assert main([*argv, "--checkpoint=999"]) == 2
    assert "has no finished step 999" in capsys.readouterr().err
    assert main([*argv, f"--output={tmp_path / 'out'}"]) == 2
    assert "out: exists already" in capsys.readouterr().err
    assert main([*argv, f"--output={tmp_path / 'scores.json'}"]) == 2
    assert "scores.json: would overwrite --output" in capsys.readouterr().err
    files = [f"--source={tmp_path / 'out'}", f"--reference={tmp_path / 'scores.json'}"]
    assert main([*argv, *files]) == 2
    assert "scores.json: would overwrite --reference" in capsys.readouterr().err
    assert {(tmp_path / name).read_text() for name in ("scores.json", "out")} == {"earlier"}
