"""Data for every objective: the text of installed Python libraries, or any data set of the hub or the disk."""

from depthcb_recipes.data.completions import Completions as Completions
from depthcb_recipes.data.labelled_text import LabelledText as LabelledText
from depthcb_recipes.data.labelled_tokens import LabelledTokens as LabelledTokens
from depthcb_recipes.data.packed_text import PackedText as PackedText
from depthcb_recipes.data.text_pairs import TextPairs as TextPairs
