"""One file a command of `python -m tfm`. Each parses, calls and prints; the work is done in the packages below.

A command module has `main(argv: list[str]) -> int`, which returns the exit status and raises
`tfm.config.InputError` at wrong input, and a docstring whose first line is its summary in `python -m tfm --help`.
It imports JAX and other heavy packages inside its functions, so that `--help` answers at once.
"""
