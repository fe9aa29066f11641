"""How often class names occur in large text: streamed, tokenised in parallel, one automaton for all names."""

from vlmclassifier.counting.matching import ClassMatcher, Form
from vlmclassifier.counting.stage import StageCounts, count_stage
from vlmclassifier.counting.texts import PartialTextError, read_texts
from vlmclassifier.counting.tokens import name_tokens, tokenise

__all__ = [
    "ClassMatcher", "Form", "PartialTextError", "StageCounts", "count_stage", "name_tokens", "read_texts", "tokenise",
]  # fmt: skip
