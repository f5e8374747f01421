"""Data for every objective: the text of installed Python libraries, or any data set of the hub or the disk."""

from recipes.data.completions import Completions as Completions
from recipes.data.labelled_text import LabelledText as LabelledText
from recipes.data.labelled_tokens import LabelledTokens as LabelledTokens
from recipes.data.packed_text import PackedText as PackedText
from recipes.data.text_pairs import TextPairs as TextPairs
