"""The KV cache of a decoder: one store per owner.

slot.py        `Slot`, the tensors that one owner caches
stores.py      stores: growing, static, rings for windows, fp8, recurrent states
copies.py      stores filled with the tokens of other stores
cache.py       `KVCache`, a transformers `Cache`
views.py       the layers of a cache as transformers sees them
paged.py       a pass over another library's paged cache, for several requests
accounting.py  bytes resident, written and read per token

Imports the plan, the config and kernels.
"""
