"""tfm: the encoder-decoder Transformer of "Attention Is All You Need", for translation, in JAX.

Dimension key, used as a suffix of array names throughout (`x_BTD`, `scores_BHTS`):

    B  batch rows      S  source length       T  target length     D  model width    H  heads
    K  head width      F  feed-forward width  V  vocabulary        N  layers         W  beams

`L` stands for a length that may be either side's.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Translator", "__version__"]

if TYPE_CHECKING:
    from tfm.decoding.translator import Translator


def __getattr__(name: str) -> Any:
    """Loads `Translator`, and JAX with it, only when asked for: `python -m tfm --help` has to answer at once."""
    if name == "Translator":
        from tfm.decoding.translator import Translator

        return Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
