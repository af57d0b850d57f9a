"""The functions that `import cllm` offers. Each calls what a command calls, and raises the same `UserError`s.

arguments.py types of arguments
settings.py  configs from paths, names of shipped configs and designs, dicts and config objects
plans.py     `plan`: a design as a table, a drawing and bytes
models.py    `build`, `load`, `load_tokenizer`, `export`
runs.py      `prepare`, `train`, `lightning_modules`, `compare`
scores.py    `score`, `compress`
caches.py    whether a cache was filled by a model
prefixes.py  `PrefixStore`, `save_prefix`, `load_prefix`

Imports every package below commands. This file imports nothing: `cllm/__init__.py` imports a module here when one of
its functions is first used.
"""
