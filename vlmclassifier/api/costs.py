"""The estimated cost of a run, and its actual cost by the token counts of the servers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmclassifier.records import Prediction

CHARACTERS_PER_TOKEN = 4  # of English text, roughly
# Assumed per answer before there is a recorded one: of a name, with chain of thought, of five questions as JSON.
ANSWER_TOKENS, THOUGHT_TOKENS, QUESTIONS_TOKENS = 64, 300, 700


@dataclass(frozen=True)
class Usage:
    """Requests and tokens, estimated or actual."""

    calls: int
    input_tokens: int
    output_tokens: int

    def cost(self, prices: Sequence[float]) -> float:
        """The cost in US dollars; `prices`: US dollars per million input tokens and per million output tokens."""
        return (self.input_tokens * prices[0] + self.output_tokens * prices[1]) / 1e6

    def sentence(self, prices: Sequence[float] | None) -> str:
        """The calls, the tokens and the cost as a sentence."""
        text = f"{self.calls:,} calls, {self.input_tokens:,} tokens in, {self.output_tokens:,} tokens out"
        if prices is None:
            return text + "; cost unknown (--prices IN OUT: US dollars per million tokens)"
        return f"{text}: {self.cost(prices):.2f} US dollars at {prices[0]:g} and {prices[1]:g} per million tokens"


def total_usage(usages: Sequence[Usage]) -> Usage:
    """The sum of several usages."""
    return Usage(
        sum(usage.calls for usage in usages), sum(usage.input_tokens for usage in usages),
        sum(usage.output_tokens for usage in usages),
    )  # fmt: skip


def recorded_usage(predictions: Sequence[Prediction]) -> Usage:
    """The actual usage of recorded answers."""
    replies = [prediction.reply for prediction in predictions if prediction.reply is not None]
    return Usage(
        len(replies), sum(reply.input_tokens for reply in replies), sum(reply.output_tokens for reply in replies)
    )


def estimated_usage(
    provider: str, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], max_side: int, recorded: Usage,
    answer_tokens: int = ANSWER_TOKENS,
) -> Usage:  # fmt: skip
    """The estimated usage of one request per prompt.

    `sizes`: widths and heights in pixels of the images, or of a sample of them. `max_side`: the longer side in pixels
    to which images are shrunk. `recorded`: the usage of the recorded answers of the same run; if there are any, the
    estimate uses their means, else `answer_tokens` per answer.
    """
    calls = len(prompts)
    if recorded.calls and recorded.input_tokens:
        input_tokens = round(calls * recorded.input_tokens / recorded.calls)
        output_tokens = round(calls * recorded.output_tokens / recorded.calls)
        return Usage(calls, input_tokens, output_tokens)
    tokens_per_image = [image_tokens(provider, width, height, max_side) for width, height in sizes] or [0]
    prompt_tokens = sum(len(prompt) for prompt in prompts) / CHARACTERS_PER_TOKEN
    input_tokens = round(prompt_tokens + calls * sum(tokens_per_image) / len(tokens_per_image))
    return Usage(calls, input_tokens, calls * answer_tokens)


def image_tokens(provider: str, width: int, height: int, max_side: int) -> int:
    """The tokens of one image, by the rule that the provider publishes for its older models; newer models may differ.

    OpenAI: 85 + 170 for each tile of 512 pixels, with the shorter side at most 768. Anthropic: pixels / 750. Google:
    258 for each tile of 768 pixels.
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
