"""Check the corpus, train the tokenizer and store the token ids; `train` does it too when it has not been done.

Where a store is there already, its content is compared with the hashes that were taken when it was written."""

from __future__ import annotations

import dataclasses

from tfm.commands.options import parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Check a corpus, train its tokenizer and store its token ids, once."""

    workdir: str
    """Directory of the run; the token store is WORKDIR/store unless data.store says otherwise."""
    config: str | None = None
    """Name of a shipped config, or the path of a .py file with get_config(); the run's own if there is one."""


def main(argv: list[str]) -> int:
    arguments, config = parse("prepare", argv, Arguments)
    from tfm.checkpoint.run_directory import RunDirectory, unwritable
    from tfm.data.store import prepare, store_directory

    run = RunDirectory(arguments.workdir)
    directory = store_directory(config, run.path)
    try:
        has_begun = run.has_begun()
    except OSError as error:
        raise unwritable(run.path, error) from error
    store = prepare(config, directory, run.brought_tokenizer(config), has_begun)
    store.verify()  # whether it was just written or had been there: a disk may have changed it since
    print(store.report)
    print(f"token store: {store.directory}, {store.tokenizer.vocab_size} pieces, corpus hash {store.corpus_hash[:16]}")
    return 0
