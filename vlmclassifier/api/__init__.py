"""Models behind an API: OpenAI, Anthropic, Google, and any server that speaks OpenAI's language."""

from vlmclassifier.api.servers import Api, NoAnswer, encode_picture, load_api

__all__ = ["Api", "NoAnswer", "encode_picture", "load_api"]
