"""The decoder: modules whose layers are connected as the KV plan says.

decoder.py    `Decoder`: token ids to logits, slots passed from layer to layer
block.py      one layer: attention and feed-forward
attention.py  the mixers: softmax attention, latent attention, gated retention
joint.py      the mixers of reads of several slots at once: one softmax over them, a gated sum
context.py    the state that all layers of one forward pass share
requests.py   the context of a pass over several requests, in one row of tokens
tail.py       the context of a prompt's last tokens, which alone continue in its highest layers
sources.py    the modules that write and read slots
fusion.py     fused reads whose weights are complex numbers or matrices
loop.py       weights that the turns of a loop share
initial.py    initial weights
loss.py       output head and cross-entropy in chunks
embedding.py  scaled embeddings of tokens
mlp.py        gated feed-forward
norm.py       RMSNorm
rope.py       rotary position embedding
parts.py      the parts of a model that training treats differently
precision.py  the dtype of matrix products
graph.py      a decoding step as a CUDA graph
hungarian.py  the best one-to-one matching of two sets
value_folds.py  values of two layers in common coordinates
sizes.py      parameter and FLOP counts, and `build_decoder`
misfit.py     how a checkpoint's tensors differ from a model's

Imports the plan, the config, kernels and the cache.
"""
