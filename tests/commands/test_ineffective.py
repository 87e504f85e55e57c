import pytest

from tfm.__main__ import main
from tfm.commands.ineffective import refuse_without_effect
from tfm.commands.typed import Given
from tfm.config import InputError


def given(*options: str) -> list[Given]:
    return [Given(name, (value,)) for name, _, value in (option.partition("=") for option in options)]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("demo", ["hosts.count=2"], "has no effect on tfm demo, which runs on one host"),
        ("explain", ["hosts.index=0"], "has no effect on tfm explain, which runs on one host"),
        ("evaluate", ["training.seed=3"], "has no effect on tfm evaluate, which trains nothing"),
        ("score", ["optimizer.name=adam"], "has no effect on tfm score, which trains nothing"),
        ("evaluate", ["data.tokenizer=a.model"], "has no effect on tfm evaluate, which reads the test split alone"),
        ("evaluate", ["data.corpus=demo", "source=a"], "has no effect with --source, which is read in place"),
        ("benchmark train", ["data.segmentations=4"], "has no effect without --lengths=corpus"),
        ("translate", ["data.target_language=fr"], "has no effect on tfm translate, which reads no corpus"),
        ("score", ["decoding.beam_size=8"], "has no effect on tfm score, which searches for nothing"),
        ("score", ["decoding.sampling_seed=8"], "has no effect on tfm score, which searches for nothing"),
        ("explain", ["decoding.n_best=4"], "has no effect on tfm explain, which shows one translation"),
        ("explain", ["decoding.sentences_per_batch=4"], "has no effect on tfm explain, which shows one translation"),
        ("explain", ["decoding.beam_size=4", "target=a"], "has no effect with --target, which is shown as it is"),
        ("translate", ["model.attention=plain"], "has no effect on tfm translate, which trains nothing"),
        ("explain", ["mesh.tensor=2"], "has no effect on tfm explain, which uses one device"),
        ("benchmark decode", ["decoding.min_length=2"], "whose searches end where --length says"),
        ("translate", ["decoding.beam_size=7", "decoding.sampling=True"], "has no effect with --decoding.sampling"),
        ("explain", ["decoding.beam_size=7", "decoding.sampling=True"], "has no effect with --decoding.sampling"),
        ("score", ["decoding.average=last:2", "checkpoint=4"], "has no effect with --checkpoint, which says whose"),
        ("train", ["data.tokenizer_model=bpe", "training.initialize_from=a"], "whose tokenizer is taken"),
        ("plan", ["workdir=a", "config=base"], "has no effect with --config, which says what is planned"),
        ("plan", ["mesh.fsdp=2", "meshes=all"], "and --meshes say both which mesh is planned"),
        ("translate", ["decoding.ensemble_mean=probs"], "has no effect without --ensemble"),
        ("evaluate", ["data.corpus=demo", "source=a"], "has no effect with --source"),
        ("benchmark train", ["decoding.beam_size=9"], "has no effect on tfm benchmark train, which translates nothing"),
        ("benchmark train", ["data.store=a", "lengths=full"], "has no effect without --lengths=corpus"),
        ("benchmark train", ["data.source_row_length=9", "sweep=length=8,16"], "and --sweep=length=8,16 say both"),
        ("benchmark decode", ["optimizer.name=adam"], "has no effect on tfm benchmark decode, which trains nothing"),
        ("benchmark decode", ["data.corpus=demo"], "whose sentences are random"),
        ("benchmark decode", ["training.remat=dots"], "has no effect on tfm benchmark decode, which trains nothing"),
        ("benchmark decode", ["decoding.average=last:2"], "whose parameters are random"),
        ("benchmark decode", ["decoding.beam_size=8", "beams=1"], "has no effect with --beams"),
        ("benchmark decode", ["decoding.tokens_per_batch=8", "batches=1"], "has no effect with --batches"),
        ("benchmark decode", ["decoding.tokens_per_batch=8", "sweep=batch=1,2"], "and --sweep=batch=1,2 say both"),
        ("benchmark train", ["training.steps=50"], "which times --steps updates and nothing beside them"),
        ("benchmark train", ["training.evaluate_every=5"], "which times --steps updates and nothing beside them"),
        ("benchmark train", ["data.read_ahead=4"], "has no effect without --pipeline"),
        ("translate", ["mesh.tensor=-1"], "expected the number of devices that share the heads"),
        ("benchmark decode", ["mesh.fsdp=2"], "splits sentences over all devices, and heads by mesh.tensor"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(command, options, message):
    with pytest.raises(InputError) as refused:
        refuse_without_effect(command, given(*options))
    text = str(refused.value)
    assert text.startswith(f"--{options[0]}") and message in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("score", ["decoding.length_penalty=1", "decoding.max_source_length=64", "decoding.average=last:3"]),
        ("translate", ["decoding.beam_size=7", "decoding.sampling=False", "mesh.tensor=2", "hosts.count=2"]),
        ("translate", ["decoding.ensemble_mean=probs", "ensemble=a"]),
        ("evaluate", ["data.target_language=fr", "source=a", "decoding.n_best=1"]),
        ("train", ["data.tokenizer_model=bpe", "training.seed=1", "mesh.fsdp=2"]),
        ("benchmark train", ["mesh.fsdp=2", "training.seed=1", "data.source_row_length=9", "sweep=batch=8,16"]),
        ("benchmark train", ["data.corpus=demo", "lengths=corpus"]),
        ("benchmark train", ["data.read_ahead=4", "pipeline=True", "training.remat=dots"]),
        ("benchmark decode", ["data.vocab_size=300", "training.deterministic=True", "training.seed=1"]),
        ("benchmark decode", ["decoding.tokens_per_batch=8", "sweep=length=1,2"]),
    ],
)
def test_what_has_an_effect_is_not_refused(command, options):
    refuse_without_effect(command, given(*options))


def test_a_command_ends_with_one_line(trained, capsys):
    argv = ["score", f"--workdir={trained}", "--source=a", "--target=b", "--decoding.beam_size=2"]
    assert main(argv) == 2
    expected = "--decoding.beam_size=2: has no effect on tfm score, which searches for nothing: leave it out"
    assert capsys.readouterr().err == f"tfm score: error: {expected}\n"
