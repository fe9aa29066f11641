"""What a run will cost, roughly, and what it has cost by the servers' own count of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmclassifier.records import Prediction

LETTERS_PER_TOKEN = 4  # of English text, roughly
ANSWER_TOKENS = 64  # of an answer, before any has been seen


@dataclass(frozen=True)
class Usage:
    """Calls, and the tokens that were or will be paid for."""

    calls: int
    input_tokens: int
    output_tokens: int

    def cost(self, prices: Sequence[float]) -> float:
        """US dollars at `prices` for a million tokens in and out."""
        return (self.input_tokens * prices[0] + self.output_tokens * prices[1]) / 1e6

    def sentence(self, prices: Sequence[float] | None) -> str:
        """Calls, tokens and dollars in words."""
        text = f"{self.calls:,} calls, {self.input_tokens:,} tokens in, {self.output_tokens:,} tokens out"
        if prices is None:
            return text + "; cost unknown (--prices IN OUT: US dollars for a million tokens)"
        return f"{text}: {self.cost(prices):.2f} US dollars at {prices[0]:g} and {prices[1]:g} for a million tokens"


def used(predictions: Sequence[Prediction]) -> Usage:
    """What the recorded answers took."""
    replies = [p.reply for p in predictions if p.reply is not None]
    return Usage(len(replies), sum(r.input_tokens for r in replies), sum(r.output_tokens for r in replies))


def expected(
    provider: str, questions: Sequence[str], sizes: Sequence[tuple[int, int]], max_side: int, before: Usage
) -> Usage:
    """An estimate for one call per question; `sizes` are those of the pictures, or of a sample of them.

    `before`: what the recorded answers of the same run took; where there are some, their means count.
    """
    calls = len(questions)
    if before.calls and before.input_tokens:
        return Usage(calls, *(round(calls * n / before.calls) for n in (before.input_tokens, before.output_tokens)))
    pictures = [picture_tokens(provider, *size, max_side) for size in sizes] or [0]
    text = sum(map(len, questions)) / LETTERS_PER_TOKEN
    return Usage(calls, round(text + calls * sum(pictures) / len(pictures)), calls * ANSWER_TOKENS)


def picture_tokens(provider: str, width: int, height: int, max_side: int) -> int:
    """Tokens of one picture by the rule that the provider publishes for its classic models; others differ.

    OpenAI: 85 + 170 for each tile of 512 pixels, the shorter side at most 768. Anthropic: pixels / 750. Google: 258 for
    each tile of 768 pixels.
    """
    scale = min(1.0, max_side / max(width, height))
    if provider == "openai":
        scale *= min(1.0, 768 / (scale * min(width, height)))
    width, height = round(scale * width), round(scale * height)
    if provider == "anthropic":
        return math.ceil(width * height / 750)
    if provider == "google":
        return 258 if max(width, height) <= 384 else 258 * math.ceil(width / 768) * math.ceil(height / 768)
    return 85 + 170 * math.ceil(width / 512) * math.ceil(height / 512)
