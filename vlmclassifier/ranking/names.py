"""The tokens of class names as a continuation of the model's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmclassifier.ranking.trie import LabelTrie, build_trie


@dataclass(frozen=True)
class NameTokens:
    """The token ids of every name as a continuation of the prompt, and of every name tokenised alone."""

    ids: tuple[tuple[int, ...], ...]  # as continuations of the prompt
    bare_ids: tuple[tuple[int, ...], ...]  # of the name alone, without a begin token
    retokenised_count: int  # names that would change the tokens of the prompt; their `ids` are those of " name"

    @property
    def different_count(self) -> int:
        """The number of names whose tokens alone differ from those of the continuation."""
        return sum(ids != bare_ids for ids, bare_ids in zip(self.ids, self.bare_ids, strict=True))

    @property
    def different_length_count(self) -> int:
        """The number of names that have another number of tokens alone than as a continuation."""
        return sum(len(ids) != len(bare_ids) for ids, bare_ids in zip(self.ids, self.bare_ids, strict=True))

    def trie(self, paper_tokenisation: bool = False) -> LabelTrie:
        """The label trie of the names.

        `paper_tokenisation`: as in the reference code, the model's input is the continuation, but the targets are the
        tokens of the name alone, as many as the positions from the last token of the prompt on (paper, section 3.1).
        """
        if not paper_tokenisation:
            return build_trie(self.ids)
        input_ids, target_ids = [], []
        for ids, bare_ids in zip(self.ids, self.bare_ids, strict=True):
            count = min(len(bare_ids), len(ids) + 1)
            target_ids.append(bare_ids[:count])
            # The last input of a name is never run, so it can be repeated to make the lengths equal.
            input_ids.append((*ids, ids[-1])[:count])
        return build_trie(input_ids, target_ids)

    def report(self, paper_tokenisation: bool = False) -> str:
        """One line for the user; empty if every name has the same tokens alone as in the continuation."""
        parts = []
        if self.different_count:
            usage = "the input, but those of the name alone are the targets" if paper_tokenisation else "used"
            parts.append(
                f"{self.different_count} of {len(self.ids)} names have other tokens as a continuation of the prompt "
                f"than alone ({self.different_length_count} another number of tokens): the tokens of the continuation "
                f"are {usage}"
            )
        if self.retokenised_count:
            parts.append(
                f"{self.retokenised_count} names would change the tokens of the prompt and are tokenised separately, "
                "after a space"
            )
        return "; ".join(parts)


def separator(text: str) -> str:
    """What has to be inserted between a text and the next word: a space, or nothing."""
    return "" if not text or text[-1].isspace() else " "


def name_tokens(tokenizer: Any, prompt: str, names: Sequence[str]) -> NameTokens:
    """The tokens of the names as continuations of `prompt`, tokenised jointly with it (paper, section 3.1; default)."""
    space = separator(prompt)
    prompt_ids = tokenizer(prompt)["input_ids"]
    joint_ids = tokenizer([f"{prompt}{space}{name}" for name in names])["input_ids"]
    end_tokens = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while prompt_ids and prompt_ids[-1] in end_tokens and len(prompt_ids) > 1:  # the tokenizer appends end tokens
        prompt_ids = prompt_ids[:-1]
        joint_ids = [sequence[:-1] for sequence in joint_ids]
    bare_ids = [tuple(sequence) for sequence in tokenizer(list(names), add_special_tokens=False)["input_ids"]]
    ids, retokenised_count = [], 0
    for name, sequence in zip(names, joint_ids, strict=True):
        if sequence[: len(prompt_ids)] == prompt_ids:
            ids.append(tuple(sequence[len(prompt_ids) :]))
        else:
            retokenised_count += 1
            ids.append(tuple(tokenizer(f"{space}{name}", add_special_tokens=False)["input_ids"]))
    return NameTokens(tuple(ids), tuple(bare_ids), retokenised_count)
