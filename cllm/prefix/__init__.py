"""Prefixes that are stored once and used again: the caches of prompts' beginnings, in files and in memory.

fingerprint.py  the digest of a model, without which no cache is read
pack.py         a cache as named tensors and JSON, and back
trees.py        the compressed parts of a cache as JSON
file.py         one safetensors file for each prefix, checked when it is read
keys.py         names of prefixes: hash chains over tokens, separated by salt
memory.py       a tier in memory, on a device or the host
disk.py         a tier on disk: a folder that several processes share
store.py        `PrefixStore`: the longest stored prefix of a prompt, looked up in all tiers

Imports hub, posthoc, and everything below them.
"""
