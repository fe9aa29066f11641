"""The tokens of class names, as the model would continue its prompt with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmclassifier.ranking.trie import LabelTrie, build_trie


@dataclass(frozen=True)
class NameTokens:
    """Token ids of every name, and how they differ from the names' own, tokenised without a prompt."""

    ids: tuple[tuple[int, ...], ...]  # what is fed and read
    bare: tuple[tuple[int, ...], ...]  # the name alone, without a begin token
    apart: int  # names whose joint tokenisation changes the prompt's own tokens: theirs are those of " name"

    @property
    def different(self) -> int:
        """Names whose own tokens are not those of the continuation."""
        return sum(a != b for a, b in zip(self.ids, self.bare, strict=True))

    @property
    def different_length(self) -> int:
        """Names whose own tokens are not as many."""
        return sum(len(a) != len(b) for a, b in zip(self.ids, self.bare, strict=True))

    def trie(self, paper: bool = False) -> LabelTrie:
        """The trie of the names.

        `paper`: as the reference does, the continuation is fed, but the log-probabilities of the bare name's tokens
        are read, from the prompt's last token on, as far as something was fed (paper section 2).
        """
        if not paper:
            return build_trie(self.ids)
        fed, read = [], []
        for joint, bare in zip(self.ids, self.bare, strict=True):
            count = min(len(bare), len(joint) + 1)
            read.append(bare[:count])
            fed.append((*joint, joint[-1])[:count])  # a last token that is read only feeds nothing
        return build_trie(fed, read)

    def report(self, paper: bool = False) -> str:
        """One line for the user, empty where the continuation and the name alone have the same tokens."""
        parts = []
        if self.different:
            used = "fed, but those of the name alone are read" if paper else "used"
            parts.append(
                f"{self.different} of {len(self.ids)} names have other tokens as a continuation of the prompt than "
                f"alone ({self.different_length} another number of them): the continuation's are {used}"
            )
        if self.apart:
            parts.append(f"{self.apart} names would change the prompt's own tokens and are tokenised behind a space")
        return "; ".join(parts)


def separator(text: str) -> str:
    """What stands between a text and the next word."""
    return "" if not text or text[-1].isspace() else " "


def name_tokens(tokenizer: Any, prompt: str, names: Sequence[str]) -> NameTokens:
    """Tokens of the names as continuations of `prompt`, tokenised jointly with it (paper section 2, default)."""
    space = separator(prompt)
    before = tokenizer(prompt)["input_ids"]
    joint = tokenizer([f"{prompt}{space}{name}" for name in names])["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while before and before[-1] in ends and len(before) > 1:  # a tokenizer that closes every text
        before, joint = before[:-1], [ids[:-1] for ids in joint]
    bare = [tuple(ids) for ids in tokenizer(list(names), add_special_tokens=False)["input_ids"]]
    ids, apart = [], 0
    for name, tokens in zip(names, joint, strict=True):
        if tokens[: len(before)] == before:
            ids.append(tuple(tokens[len(before) :]))
        else:
            apart += 1
            ids.append(tuple(tokenizer(f"{space}{name}", add_special_tokens=False)["input_ids"]))
    return NameTokens(tuple(ids), tuple(bare), apart)
