"""Models behind an API: OpenAI, Anthropic, Google, and any server with an OpenAI-compatible API."""

from vlmclassifier.api.client import Api, Settings, TransientError, check_base_url, encode_image
from vlmclassifier.api.providers import load_api

__all__ = ["Api", "Settings", "TransientError", "check_base_url", "encode_image", "load_api"]
