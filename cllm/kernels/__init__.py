"""Kernels: attention, decoding over a cache, retention, SwiGLU, cross-entropy, and passes over compiled graphs.

attention.py         causal attention of a sequence, by the fastest backend that supports it
backends/            the kernels that compute it
joint.py             one softmax over several slots, each with a mask of its own
merge.py             merges the parts of joint.py, as one Triton kernel
decode.py            attention of one new token over cached slots
few_rows.py          products of a few rows with weights, in a decoding step
split_decode.py      launches the Triton kernels of decode.py
split_call.py        arguments that these kernels and those of tied slots and latents share
triton_decode.py     split-KV flash decoding in Triton
chunks.py            parts of keys and values as chunks of channels
split_tied.py        launches the kernel of triton_tied.py
triton_tied.py       decoding of tied slots in Triton, for one or two query heads for each KV head
split_latent.py      launches the kernel of gluon_latent.py
gluon_latent.py      decoding of a latent in Gluon, for Hopper GPUs
hopper.py            Gluon, as those kernels import it, and where it can be used
limits.py            resources of a device, and how many programs fill it
lowrank_decode.py    attention of one new token over tokens stored as low-rank factors
split_lowrank.py     launches the Triton kernels of lowrank_decode.py
lowrank_tiles.py     tiles of those kernels, by rule
triton_lowrank.py    scores and weighted sums in Triton
triton_choose.py     the choice of chunks in Triton
resident_lowrank.py  launches the kernel of gluon_lowrank.py
gluon_lowrank.py     scores of rebuilt keys in Gluon, for Hopper GPUs
triton_nodes.py      queries rotated by a few positions times factors, between which gluon_lowrank.py interpolates
gather.py            values of selected tokens, copied from host memory
rotate.py            RoPE of many keys as one kernel
selection.py         `Factored`, `Table` and `Selection`: low-rank factors, their RoPE, and which tokens a step reads
choice.py            Triton or plain torch, logged once
retention.py         gated retention
swiglu.py            SwiGLU with the activation in the products' epilogues
cross_entropy.py     cross-entropy and its gradient in place
quack.py             checks and loads quack-kernels
graph_pass.py        base of the passes over compiled graphs
fp8_casts.py         removes redundant work around casts to fp8
sum_products.py      fuses sums of matrix products

Imports errors, and the config for the names of backends.
"""
