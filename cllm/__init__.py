"""cllm: decoder language models whose layers declare where their keys and values come from."""

__version__ = "0.1.0"
