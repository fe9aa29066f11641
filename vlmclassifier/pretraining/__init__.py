"""Train a mini CLIP, a tiny language model and a mini LLaVA from scratch: minutes on two CPU cores."""
