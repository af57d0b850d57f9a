"""Serving: models in the engines of other projects.

launch.py      `cllm serve`: what is checked before vLLM's server starts, and its command line
vllm/          a plug-in of vLLM: decoders of any servable plan, with the plan's cache

Imports hub and everything below it.
"""
