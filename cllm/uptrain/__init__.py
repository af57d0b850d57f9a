"""Uptraining: a trained model converted to another KV plan and trained a little.

teacher.py     the model that `init.from` names, and the student's config that follows from it
complete.py    a config whose `model` is completed from that model
start.py       from a config with `init.from` to a student ready to train
sources.py     `init.sources: best`: fused reads of the sources that suit them best
init.py        the student's first weights, without training
project.py     K/V projections copied or averaged
owners.py      first weights of owners, one class for each kind of slot
heads.py       KV heads of two layers matched, and a layer rewritten so that its function stays
merge.py       KV heads of a layer merged into fewer
calibrate.py   inputs, keys and values of the teacher's layers on calibration text
ridge.py       shared projections by ridge regression
fit.py         least squares: fusion weights, and alignments of layers that own nothing
fold.py        values of layers brought into common coordinates before they are shared (VFOLD)
outputs.py     output projections refitted on the student's own residual stream
svd.py         latents for MLA: partial RoPE and a joint SVD
search.py      plans from measured similarity (a command line)
decoder.py     the decoder of teachers and students: recorded layers, random sources
loss.py        distillation, a chunk of logits at a time
attention.py   attention layer by layer on the teacher's residual stream, for a loss
trainable.py   what is trained: all weights, the K/V side, or LoRA
curriculum.py  from own keys and values to shared ones
handover.py    from the teacher's attention to the student's, by outputs
student.py     `Student`: everything that training needs, in one object

Imports data, the model, runs, hub, and everything below them.
"""
